"""Integrations, one host library each. They import their host late: it is slow, and may be absent."""
