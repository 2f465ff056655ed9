"""What each `flashcore` command does. Modules here may import torch and transformers; cli.py may not."""
