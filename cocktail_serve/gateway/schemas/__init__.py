"""What goes over the wire, as pydantic models: checked where it is ours, documented loosely where the engine's."""
