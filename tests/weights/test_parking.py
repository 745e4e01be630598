"""What is parked, and what goes when there is no room."""

import torch

from helexa.weights.parking import ParkedWeights, Parking


def weights(nbytes: int) -> ParkedWeights:
    return ParkedWeights(torch.zeros(nbytes, dtype=torch.uint8), {}, {})


def test_parked_weights_are_found_by_their_key_until_others_need_the_room():
    parking = Parking(100)
    first, second, third = weights(40), weights(50), weights(30)
    for key, parked in (("a", first), ("b", second)):
        assert parking.make_room(key, parked.memory.nbytes)
        parking.put(key, parked)
    assert parking.held_bytes == 90
    assert parking.find("a") is first  # used last, so the other one goes
    assert parking.make_room("c", 30)
    parking.put("c", third)
    assert (parking.find("a"), parking.find("b"), parking.find("c")) == (first, None, third)
    assert parking.held_bytes == 70


def test_what_is_parked_is_not_copied_again():
    parking = Parking(100)
    parking.put("a", weights(40))
    assert not parking.make_room("a", 40)


def test_what_is_larger_than_the_budget_moves_nothing():
    parking = Parking(100)
    parking.put("a", weights(40))
    assert not parking.make_room("b", 101)
    assert parking.held_bytes == 40


def test_two_that_come_at_once_keep_the_budget():
    parking = Parking(100)
    assert parking.make_room("a", 60)
    assert parking.make_room("b", 60)
    parking.put("a", weights(60))
    parking.put("b", weights(60))
    assert parking.held_bytes == 60
    assert parking.find("b") is not None
