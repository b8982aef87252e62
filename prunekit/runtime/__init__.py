"""The machine and the process: devices, memory, files, processes, the console, modes of models."""
