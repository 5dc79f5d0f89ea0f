"""Serving: continuous batching of exact ISD over paged keys and values. Runs from a checkout.

Reading path: `pages` (who owns which page), `requests` and `scheduler` (what the next step computes), `packing` (how it
travels), `device` (the compiled programs), `handle` (what a caller holds), `engine` (the thread), `http` (the API).
"""
