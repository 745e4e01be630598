"""One per site: API surfaces, placement, routing, cold load, eviction and metrics. Never touches a tensor."""
