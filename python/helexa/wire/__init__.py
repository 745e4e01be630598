"""The HTTP surfaces as data: request and answer types, their validation and encoding. No I/O, no engine."""
