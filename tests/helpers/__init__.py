"""What several tests need: small models, facts, sessions, folders."""
