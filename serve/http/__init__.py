"""OpenAI's protocol over an `Engine`.

Reading path: `schemas` with `conversation` and `constraints` (what may be asked), `prompts` (messages to ids), `jobs`
(one HTTP request as engine requests), `choice` with `text`, `reasoning` and `tools` (ids to a message that may be
shown), `replies` (answers), `app` (paths and errors).
"""
