"""What a deployment runs on the host, in the environment that it made there."""
