"""What benchmark and profile_step time."""
