"""The tasks: each builds its parts and hands the loop its players."""
