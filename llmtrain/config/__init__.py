"""Typed configuration: frozen dataclasses, and the one strict way to build them."""
