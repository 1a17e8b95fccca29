"""Many runs: what they are, where they run, and how they are watched."""
