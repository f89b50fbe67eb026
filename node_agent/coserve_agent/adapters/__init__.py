"""The names that clients can ask for, and the versions of adapters behind them."""
