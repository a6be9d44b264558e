"""What is kept: files that survive a crash, and objects in a store, for runs without a shared disk.

Only this package calls fsync, rename, replace, flock, lockf and mmap. Inside: `files` are those of this machine, `stores`
are the `Store` protocol and its cases: a folder, and S3.
"""

from tune_topkd.storage.cache import CACHE_VARIABLE
from tune_topkd.storage.cache import cache_folder
from tune_topkd.storage.cache import copy_of
from tune_topkd.storage.files import FileError
from tune_topkd.storage.files import Lock
from tune_topkd.storage.files import MappedFile
from tune_topkd.storage.files import disk_trouble
from tune_topkd.storage.files import file_hash
from tune_topkd.storage.files import lock
from tune_topkd.storage.files import lock_byte
from tune_topkd.storage.files import map_file
from tune_topkd.storage.files import publish
from tune_topkd.storage.files import rename
from tune_topkd.storage.files import sync
from tune_topkd.storage.files import sync_stream
from tune_topkd.storage.files import unlock_byte
from tune_topkd.storage.files import write_atomically
from tune_topkd.storage.files import write_new
from tune_topkd.storage.files import write_text
from tune_topkd.storage.stores import FolderStore
from tune_topkd.storage.stores import NoObjectError
from tune_topkd.storage.stores import S3Client
from tune_topkd.storage.stores import S3Store
from tune_topkd.storage.stores import Store
from tune_topkd.storage.stores import StoreError
from tune_topkd.storage.stores import StoreNameError
from tune_topkd.storage.stores import check_store
from tune_topkd.storage.stores import check_uri
from tune_topkd.storage.stores import is_uri
from tune_topkd.storage.stores import open_store

__all__ = [
    "CACHE_VARIABLE",
    "FileError",
    "FolderStore",
    "Lock",
    "MappedFile",
    "NoObjectError",
    "S3Client",
    "S3Store",
    "Store",
    "StoreError",
    "StoreNameError",
    "cache_folder",
    "check_store",
    "check_uri",
    "copy_of",
    "disk_trouble",
    "file_hash",
    "is_uri",
    "lock",
    "lock_byte",
    "map_file",
    "open_store",
    "publish",
    "rename",
    "sync",
    "sync_stream",
    "unlock_byte",
    "write_atomically",
    "write_new",
    "write_text",
]
