"""What the user asked for: options, profiles, defaults, and how bad values are refused."""
