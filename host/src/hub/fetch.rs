//! Files of a repository onto the disk: resumed, checked, and under their name only when whole.
//!
//! What has arrived lies in `NAME.DIGEST.partial`: a file that changed on the hub has another digest, so its pieces never
//! mix. A lock on it lets processes that want the same file wait for one of them.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};
use ureq::http::StatusCode;

use super::{Digest, Failure, Hub, Listing, RemoteFile, RepoId, Why};
use crate::error::{Error, IoContext, Result};

/// Files under way at once; one connection rarely fills a line.
const CONNECTIONS: usize = 4;
/// Attempts in a row that may bring nothing.
const ATTEMPTS: u32 = 4;
const PIECE_BYTES: usize = 256 << 10;

/// A file to fetch, and the place for it.
pub struct Wanted<'a> {
    pub file: &'a RemoteFile,
    pub path: PathBuf,
}

/// Fetches files of a listing's commit, several at once, with progress on a terminal.
pub fn fetch_all(hub: &Hub, repo: &RepoId, listing: &Listing, wanted: &[Wanted<'_>]) -> Result<()> {
    let progress = Progress::new(wanted);
    let (queue, failed) = (Mutex::new(wanted.iter()), AtomicBool::new(false));
    let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    let failures: Vec<Error> = std::thread::scope(|scope| {
        let work = || {
            while let Some(wanted) = next().filter(|_| !failed.load(Ordering::Relaxed)) {
                let bar = progress.begin(wanted.file);
                let outcome = Fetch { hub, repo, commit: &listing.commit, wanted, bar: &bar, all: &progress.all }.run();
                bar.finish_and_clear();
                if let Err(error) = outcome {
                    failed.store(true, Ordering::Relaxed);
                    return Some(error);
                }
            }
            None
        };
        let threads: Vec<_> = (0..CONNECTIONS.min(wanted.len())).map(|_| scope.spawn(work)).collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap_or_else(|_| Some(panicked()))).collect()
    });
    progress.all.finish_and_clear();
    // One network is down for all of them alike.
    failures.into_iter().next().map_or(Ok(()), Err)
}

fn panicked() -> Error {
    Error::bug("a download ended in a panic")
}

struct Progress {
    bars: MultiProgress,
    all: ProgressBar,
}

impl Progress {
    fn new(wanted: &[Wanted<'_>]) -> Self {
        let bars = MultiProgress::new();
        let total = wanted.iter().map(|wanted| wanted.file.size).sum();
        let all = bars.add(bar(total, format!("{} files", wanted.len())));
        all.tick();
        Self { bars, all }
    }

    fn begin(&self, file: &RemoteFile) -> ProgressBar {
        self.bars.insert_before(&self.all, bar(file.size, file.path.clone()))
    }
}

/// Shows nothing where stderr is no terminal.
fn bar(bytes: u64, name: String) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:40!} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(bytes).with_prefix(name).with_style(style)
}

struct Fetch<'a> {
    hub: &'a Hub,
    repo: &'a RepoId,
    commit: &'a str,
    wanted: &'a Wanted<'a>,
    bar: &'a ProgressBar,
    all: &'a ProgressBar,
}

impl Fetch<'_> {
    fn run(&self) -> Result<()> {
        let (file, path) = (self.wanted.file, &self.wanted.path);
        if is_whole(path, file)? {
            self.progress(file.size);
            return Ok(());
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).path_context("make the folder", folder)?;
        let partial_path = partial_path(path, file);
        let mut partial = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&partial_path)
            .path_context("write", &partial_path)?;
        partial.lock().path_context("lock", &partial_path)?;
        // Whoever held the lock before may have finished the file.
        if is_whole(path, file)? {
            let _ = fs::remove_file(&partial_path);
            self.progress(file.size);
            return Ok(());
        }
        let mut resumed = self.fill(&mut partial, &partial_path).inspect_err(|_| {
            if partial_is_empty(&partial_path) {
                let _ = fs::remove_file(&partial_path);
            }
        })?;
        loop {
            // Of what is on the disk now, not of what went by: pieces may be of several runs.
            let found = digest_of(&mut partial, file).path_context("read", &partial_path)?;
            if found == file.digest {
                break;
            }
            partial.set_len(0).path_context("write", &partial_path)?;
            if !resumed {
                let _ = fs::remove_file(&partial_path);
                return Err(Error::run(format!("`{}` arrived damaged; it is not kept", file.path))
                    .cause(format!("its hash is {}, the hub says {}", found.hex(), file.digest.hex()))
                    .hint("run the command again; if it stays so, the network or the mirror changes files"));
            }
            // What lay there from before may be at fault.
            resumed = false;
            self.fill(&mut partial, &partial_path)?;
        }
        partial.sync_all().path_context("write", &partial_path)?;
        fs::rename(&partial_path, path).path_context("write", path)?;
        File::open(folder).and_then(|folder| folder.sync_all()).path_context("sync", folder)
    }

    fn progress(&self, bytes: u64) {
        self.bar.inc(bytes);
        self.all.inc(bytes);
    }

    /// Brings the file to its size; returns whether part of it was there already.
    fn fill(&self, partial: &mut File, partial_path: &Path) -> Result<bool> {
        let file = self.wanted.file;
        let mut have = partial.metadata().path_context("read", partial_path)?.len();
        if have > file.size {
            partial.set_len(0).path_context("write", partial_path)?;
            have = 0;
        }
        let resumed = have > 0;
        self.bar.set_position(have);
        self.all.inc(have);
        let (mut attempt, mut last) = (0, String::new());
        while have < file.size {
            if attempt == ATTEMPTS {
                return Err(Error::run(format!(
                    "the download of `{}` broke off after {have} of {} bytes",
                    file.path, file.size
                ))
                .cause(last)
                .hint("run the same command again: it goes on where it stopped"));
            }
            if attempt > 0 {
                std::thread::sleep(Duration::from_millis(250) * 2u32.pow(attempt));
            }
            let before = have;
            match self.attempt(partial, &mut have)? {
                Ok(()) => last = "the connection was closed early".to_owned(),
                Err(why) => last = why,
            }
            attempt = if have > before { 1 } else { attempt + 1 };
        }
        Ok(resumed)
    }

    /// Appends what one answer brings. The outer error ends the download, the inner one is worth another attempt.
    fn attempt(&self, partial: &mut File, have: &mut u64) -> Result<Result<(), String>> {
        let file = self.wanted.file;
        let response = match self.hub.file(self.repo, self.commit, file, *have) {
            Ok(response) => response,
            Err(Failure { why: Why::Unreachable, error }) if !self.hub.is_offline => {
                return Ok(Err(error.causes.first().unwrap_or(&error.message).clone()));
            }
            Err(failure) => return Err(failure.error),
        };
        // A server that ignores the range starts over, and so do we; one that calls it wrong gets no range next.
        let goes_on = *have > 0 && response.status() == StatusCode::PARTIAL_CONTENT;
        let from = response.headers().get("content-range").and_then(|range| range.to_str().ok());
        let is_ours = from.is_some_and(|range| range.starts_with(&format!("bytes {have}-")));
        if *have > 0 && !(goes_on && is_ours) {
            self.bar.set_position(0);
            self.all.dec(*have);
            *have = 0;
            partial.set_len(0).path_context("write", &self.wanted.path)?;
            if response.status() != StatusCode::OK {
                return Ok(Err(format!("the hub answered {} to a range", response.status())));
            }
        }
        partial.seek(SeekFrom::Start(*have)).path_context("write", &self.wanted.path)?;
        let mut body = response.into_body().into_reader();
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let count = match body.read(&mut piece) {
                Ok(0) => return Ok(Ok(())),
                Ok(count) => count,
                Err(error) => return Ok(Err(error.to_string())),
            };
            if *have + count as u64 > file.size {
                return Err(Error::run(format!(
                    "`{}` is longer than the {} bytes the hub lists",
                    file.path, file.size
                )));
            }
            partial.write_all(&piece[..count]).path_context("write", &self.wanted.path)?;
            *have += count as u64;
            self.progress(count as u64);
        }
    }
}

/// Returns whether the file is there with the content the hub has. Hashing is far cheaper than fetching.
pub fn is_whole(path: &Path, file: &RemoteFile) -> Result<bool> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() == file.size => {
            let mut content = File::open(path).path_context("read", path)?;
            Ok(digest_of(&mut content, file).path_context("read", path)? == file.digest)
        }
        Ok(metadata) if metadata.is_dir() => {
            Err(Error::config(format!("`{}` is a folder, and the repository has a file of that name", path.display())))
        }
        _ => Ok(false),
    }
}

fn partial_path(path: &Path, file: &RemoteFile) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}.{}.partial", &file.digest.hex()[..12]))
}

fn partial_is_empty(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.len() == 0)
}

/// Hashes a file the way the hub did.
fn digest_of(content: &mut File, file: &RemoteFile) -> std::io::Result<Digest> {
    fn hash<D: sha1::Digest + Write>(mut hasher: D, content: &mut File) -> std::io::Result<String> {
        std::io::copy(content, &mut hasher)?;
        Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
    content.seek(SeekFrom::Start(0))?;
    Ok(match file.digest {
        Digest::Sha256(_) => Digest::Sha256(hash(Sha256::new(), content)?),
        Digest::GitBlob(_) => {
            let mut hasher = Sha1::new();
            sha1::Digest::update(&mut hasher, format!("blob {}\0", content.metadata()?.len()));
            Digest::GitBlob(hash(hasher, content)?)
        }
    })
}
