"""The engine process (queue, scheduler, worker group) and the worker processes, one per device."""
