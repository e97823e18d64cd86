"""CRC-32 of members of archives. The package isal of the extra ``fast`` takes a quarter of zlib's
time.
"""

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
