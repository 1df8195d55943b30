"""Conversations and preference pairs to token stores whose tokens have roles."""
