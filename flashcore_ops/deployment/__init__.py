"""Puts FlashCore on another host over ssh and validates it there.

Nothing here needs torch or transformers; what runs on the host and does need them is in `on_host`.
"""
