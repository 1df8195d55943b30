"""Commands that prove on the user's own configuration what the documentation promises."""
