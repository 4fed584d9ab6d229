"""What was asked for: options, profiles, defaults, and how bad ones are refused."""
