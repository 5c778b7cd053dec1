"""The hard VLM's own training: two halves apart, then joined."""
