"""What this machine has: memory and cores."""
