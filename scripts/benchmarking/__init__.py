"""What lies behind benchmark and profile_step."""
