"""Let OpenMP's threads sleep while they wait for work: programs import this module before torch.

Threads that spin while they wait take the cores that other jobs, loading processes and the operators' own threads need:
beside one busy process a step of two threads takes several times as long (docs/speed.md). OpenMP reads the variable once,
when torch loads it; child processes inherit it. What the user has set stays.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
