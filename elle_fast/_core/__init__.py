"""What every floor stands on: checks of arguments, files written whole, derived seeds."""
