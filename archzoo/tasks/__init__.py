"""What a comparison runs on. One file a task; `Task` in task.py says what a task owns."""
