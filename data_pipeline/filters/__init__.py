"""Published filter rules, one module per publication."""
