"""How a run is divided among processes. No framework is needed here; a backend applies it."""
