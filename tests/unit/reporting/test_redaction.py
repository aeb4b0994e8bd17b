"""Settings on a page: secrets are hidden, everything else is shown."""

from __future__ import annotations

import pytest

from flep_fl.reporting.redaction import HIDDEN, flat_settings, redacted


@pytest.mark.parametrize(
    "name",
    [
        "secret_images",
        "password",
        "passphrase",
        "api_token",
        "key",
        "noise_key",
        "key_file",
        "private_folder",
        "dsn",
    ],
)
def test_a_name_that_says_secret_hides_the_value(name: str) -> None:
    settings = {"section": {name: "swordfish"}}
    assert flat_settings(settings) == [(f"section.{name}", HIDDEN)]
    assert "swordfish" not in str(redacted(settings))


@pytest.mark.parametrize("name", ["keyed", "recovery", "monkey_count", "std", "tokens_per_second"])
def test_other_names_are_shown(name: str) -> None:
    assert flat_settings({"s": {name: "plain"}}) == [(f"s.{name}", "plain")]


def test_a_secret_that_is_not_set_is_shown_as_such() -> None:
    assert flat_settings({"cipher": {"secret_images": None}}) == [("cipher.secret_images", "null")]


def test_passwords_inside_addresses_are_hidden() -> None:
    settings = {"tracking": {"uri": "postgresql://me:swordfish@host/db"}, "list": ["https://u:swordfish@h"]}
    assert "swordfish" not in str(flat_settings(settings))
    assert "host/db" in str(flat_settings(settings))


def test_lists_and_truth_values_look_like_configuration() -> None:
    settings = {"a": [1, 2.5, "x"], "b": True, "c": {"d": None}}
    assert flat_settings(settings) == [("a", "[1, 2.5, x]"), ("b", "true"), ("c.d", "null")]
