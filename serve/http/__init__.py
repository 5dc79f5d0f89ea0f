"""OpenAI's protocol over an `Engine`.

Reading path: `schemas` (what may be asked), `prompts` (text to ids), `jobs` (one HTTP request as engine requests),
`text` (ids to text that may be shown), `replies` (answers), `app` (paths and errors).
"""
