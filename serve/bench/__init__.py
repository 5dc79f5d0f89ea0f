"""`python -m serve.bench`: load on OpenAI-compatible servers, and what it costs them and their callers.

Reading path: `prompts` (what is asked), `client` (one request and its timestamps), `load` (when requests are sent),
`rounds` (which target is asked when), `measures` (statistics), `report` and `plot` (what is written), `servers` (this
project's own, started for the occasion). Nothing here imports jax, which
would compete with the servers for the machine.
"""
