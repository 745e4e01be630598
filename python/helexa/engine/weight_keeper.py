"""The weights of one engine, which may stay in main memory when it leaves its device."""

from helexa.weights.load import GGUFWeights
from helexa.weights.parking import ParkedWeights, Parking


class WeightKeeper:
    """Says whether weights were parked by an earlier engine, and parks them after this one."""

    def __init__(self, parking: Parking | None, key: str):
        """key: says what weights these are."""
        self._parking, self._key = parking, key
        self._weights: GGUFWeights | None = None

    def find(self) -> ParkedWeights | None:
        """What an earlier engine left."""
        return None if self._parking is None else self._parking.find(self._key)

    def keep(self, weights: GGUFWeights) -> None:
        """Remembers the weights, of whatever device, until `park` or `forget`."""
        if self._parking is not None:
            self._weights = weights

    def park(self) -> None:
        """Parks the weights if they are on a device, are not parked already and fit the budget."""
        weights, parking = self._weights, self._parking
        if weights is None or parking is None or not weights.placed_bytes:
            return
        if not parking.make_room(self._key, weights.parked_bytes):
            return
        if (parked := weights.park()) is not None:
            parking.put(self._key, parked)

    def forget(self) -> None:
        """Lets go of the weights."""
        self._weights = None
