"""Fast inference behind the steps: batching, prefix sharing, packed replay."""
