"""How a module or a loop is spread over ranks. Knows no model by name."""
