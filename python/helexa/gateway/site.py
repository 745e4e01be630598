"""What the parts of a gateway have in common; those of the next configuration have another one."""

from dataclasses import dataclass

from helexa.gateway.catalogue import Catalogue
from helexa.gateway.config import GatewayConfig
from helexa.gateway.fleet import Fleet
from helexa.gateway.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Site:
    """Configuration and catalogue as they were read, and the fleet and its counters, which outlive them."""

    config: GatewayConfig
    catalogue: Catalogue
    fleet: Fleet
    metrics: Metrics
