"""The daemon of one host: discovers it, loads models, admits requests to them and serves them over HTTP."""
