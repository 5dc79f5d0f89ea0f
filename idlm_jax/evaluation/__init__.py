"""`idlm eval --suite`: public benchmarks, run by public harnesses through a server, in one table.

Reading path: `suite` (which benchmarks, how sampled), `lm_eval` and `evalscope` (one harness each: its command, its
results), `run` (one benchmark after the other, what is finished stays), `counters` (tokens per forward of the server),
`sandbox` (where generated programs run), `summary` (the table, beside published figures). Nothing here imports jax: the
model is in the server.
"""
