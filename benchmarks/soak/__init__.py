"""Random traffic against a server for minutes or hours, and what must hold during and after it.

Reading path: `traffic` (what is sent, and which answers are right), `watch` (the server's process), `course` (one run,
from start to SIGTERM), `report`, `__main__`.
"""
