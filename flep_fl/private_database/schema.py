"""Tables of the private database: sealed columns under random identifiers."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import DateTime, ForeignKey, LargeBinary, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

FORMAT_VERSION = 1


class Base(DeclarativeBase):
    """Declarative base of this database."""


class MetaRow(Base):
    """The one row that says what this file is.

    ``salt`` separates the key-wrapping keys of databases of one owner; ``sealed`` holds the data set's name
    and class names and doubles as the test of the owner's key.
    """

    __tablename__ = "meta"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]
    salt: Mapped[bytes] = mapped_column(LargeBinary)
    sealed: Mapped[bytes] = mapped_column(LargeBinary)


class RecordRow(Base):
    """One image: a data key wrapped by the owner's key; tags (label, split) and pixels sealed under it."""

    __tablename__ = "records"

    record_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    wrapped_key: Mapped[bytes] = mapped_column(LargeBinary)
    sealed_tags: Mapped[bytes] = mapped_column(LargeBinary)
    sealed_image: Mapped[bytes] = mapped_column(LargeBinary)


class ReleaseRow(Base):
    """Access log: one record left for one site (named inside ``sealed_grant``) at a time (UTC)."""

    __tablename__ = "releases"

    id: Mapped[int] = mapped_column(primary_key=True)
    record_id: Mapped[str] = mapped_column(ForeignKey("records.record_id"), index=True)
    sealed_grant: Mapped[bytes] = mapped_column(LargeBinary)
    released_at: Mapped[datetime] = mapped_column(DateTime)
