//! The cache of the hub's tools (`HF_HUB_CACHE`, `HF_HOME/hub`, `~/.cache/huggingface/hub`), in their layout: what Python
//! fetched is found here, and the other way round.
//!
//! `blobs/DIGEST` is content, `snapshots/COMMIT/PATH` a link to it, `refs/REVISION` the commit a name was last seen at. One
//! file more is ours: `listings/COMMIT.json`, without which nobody could tell offline whether all shards of a split are
//! there.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use hf_hub::Cache;

use super::fetch::{Wanted, fetch_all};
use super::{Hub, Listing, RemoteFile, RepoId, is_commit, variable};
use crate::error::{Error, IoContext, Result};

/// Where the cache is; `None` where there is no home.
pub fn folder() -> Option<Cache> {
    let path = |name: &str| variable(name).map(PathBuf::from);
    let below_home =
        || Some(path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")))?.join("huggingface"));
    let folder = path("HF_HUB_CACHE").or_else(|| Some(path("HF_HOME").or_else(below_home)?.join("hub")))?;
    Some(Cache::new(folder))
}

/// A repository's part of the cache.
pub struct CachedRepo<'a> {
    repo: &'a RepoId,
    cache: Cache,
}

impl<'a> CachedRepo<'a> {
    pub fn open(repo: &'a RepoId) -> Result<Self> {
        let cache = folder().ok_or_else(|| {
            Error::config("there is no folder for what is fetched from the hub: HOME is not set").hint("set HF_HOME")
        })?;
        Ok(Self { repo, cache })
    }

    /// What a revision held when it was last looked at.
    pub fn listing(&self, revision: &str) -> Option<Listing> {
        let commit = match is_commit(revision) {
            true => revision.to_owned(),
            false => fs::read_to_string(self.folder().join("refs").join(revision)).ok()?.trim().to_owned(),
        };
        let text = fs::read(self.listing_path(&commit)).ok().filter(|_| is_commit(&commit))?;
        serde_json::from_slice::<Listing>(&text).ok().filter(|listing| listing.commit == commit)
    }

    /// Keeps a listing, and that `revision` is its commit.
    pub fn keep_listing(&self, revision: &str, listing: &Listing) -> Result<()> {
        let path = self.listing_path(&listing.commit);
        let text = serde_json::to_vec(listing).map_err(|error| Error::bug("a listing is not JSON").cause(error))?;
        write_whole(&path, &text)?;
        if revision != listing.commit {
            write_whole(&self.folder().join("refs").join(revision), listing.commit.as_bytes())?;
        }
        Ok(())
    }

    pub fn path(&self, listing: &Listing, file: &RemoteFile) -> PathBuf {
        self.cache.repo(self.repo.at("main")).pointer_path(&listing.commit).join(&file.path)
    }

    /// Returns whether a file is there. Its content was checked when it came; the blob's name says which it is.
    pub fn has(&self, listing: &Listing, file: &RemoteFile) -> bool {
        fs::metadata(self.path(listing, file)).is_ok_and(|metadata| metadata.len() == file.size)
    }

    /// Fetches what is missing of `files`.
    pub fn fetch(&self, hub: &Hub, listing: &Listing, files: &[&RemoteFile]) -> Result<()> {
        let repo = self.cache.repo(self.repo.at("main"));
        let missing = || files.iter().filter(|file| !self.has(listing, file));
        let wanted: Vec<_> = missing().map(|&file| Wanted { file, path: repo.blob_path(file.digest.hex()) }).collect();
        fetch_all(hub, self.repo, listing, &wanted)?;
        for file in missing() {
            let link = self.path(listing, file);
            let folder = link.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(folder).path_context("make the folder", folder)?;
            let up = "../".repeat(file.path.split('/').count() + 1);
            // A link that leads nowhere, or to what the file was before.
            let _ = fs::remove_file(&link);
            match symlink(format!("{up}blobs/{}", file.digest.hex()), &link) {
                // Another process was faster.
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(error).path_context("write", &link);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn folder(&self) -> PathBuf {
        self.cache.path().join(self.repo.at("main").folder_name())
    }

    fn listing_path(&self, commit: &str) -> PathBuf {
        self.folder().join("listings").join(format!("{commit}.json"))
    }
}

fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).path_context("make the folder", folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder).path_context("write in", folder)?;
    file.write_all(bytes).path_context("write", path)?;
    file.persist(path).map_err(|error| error.error).path_context("write", path).map(|_| ())
}
