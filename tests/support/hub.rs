//! A small hub on loopback: repositories in memory, gated or not, with the real one's addresses, headers and error codes,
//! and the faults a network has. Large files are redirected to a second host, as to the real one's storage.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use serde_json::{Value, json};
use sha1::Digest as _;

/// Has access to everything.
pub const TOKEN: &str = "hf_thisisthetokenofafriend";
/// Is known, and has access to nothing special.
pub const STRANGER: &str = "hf_thisisthetokenofastranger";

/// Files above are stored apart, like those that git LFS keeps.
const LARGE: usize = 1000;
/// Files on a page of the list.
const PAGE: usize = 3;

#[derive(Clone, Copy, PartialEq)]
pub enum Access {
    Public,
    Gated,
    Private,
}

struct Repo {
    access: Access,
    revisions: BTreeMap<String, Revision>,
}

struct Revision {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
}

impl Repo {
    /// By name or commit.
    fn at(&self, revision: &str) -> Option<&Revision> {
        self.revisions.get(revision).or_else(|| self.revisions.values().find(|found| found.commit == revision))
    }
}

/// What goes wrong with files, by path.
#[derive(Default)]
pub struct Faults {
    /// Connections are closed after so many bytes, so many times.
    pub cut: BTreeMap<String, (usize, usize)>,
    /// A byte is changed on the way.
    pub damage: BTreeSet<String>,
    pub ignore_ranges: bool,
    /// Answers to everything, such as `503 Service Unavailable`.
    pub status: Option<&'static str>,
    /// The list names this file too.
    pub listed: Option<Value>,
    pub not_json: bool,
}

#[derive(Clone, Debug)]
pub struct Asked {
    pub path: String,
    pub range: Option<String>,
    pub has_token: bool,
    pub is_storage: bool,
}

#[derive(Default)]
struct State {
    repos: BTreeMap<String, Repo>,
    faults: Faults,
    asked: Vec<Asked>,
    storage: String,
}

pub struct Hub {
    pub address: String,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    listeners: Vec<(std::net::SocketAddr, JoinHandle<()>)>,
}

impl Hub {
    pub fn start() -> Self {
        let mut hub = Self { address: String::new(), state: Arc::default(), stop: Arc::default(), listeners: vec![] };
        hub.address = hub.listen("127.0.0.1:0", false);
        let storage = hub.listen("127.0.0.2:0", true);
        hub.state().storage = storage;
        hub
    }

    fn listen(&mut self, at: &str, is_storage: bool) -> String {
        let listener = TcpListener::bind(at).unwrap();
        let address = listener.local_addr().unwrap();
        let (state, stop) = (self.state.clone(), self.stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stop.load(Ordering::SeqCst) {
                    return;
                }
                let state = state.clone();
                // A client that goes away is none of our business.
                std::thread::spawn(move || answer(stream.ok()?, &state, is_storage).ok());
            }
        });
        self.listeners.push((address, thread));
        format!("http://{address}")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Adds a revision of `models/ORG/NAME` or `datasets/ORG/NAME`.
    pub fn add<'f>(
        &self,
        repo: &str,
        access: Access,
        revision: &str,
        files: impl IntoIterator<Item = (&'f str, Vec<u8>)>,
    ) -> &Self {
        let files: BTreeMap<_, _> = files.into_iter().map(|(path, content)| (path.to_owned(), content)).collect();
        let mut hasher = sha1::Sha1::new_with_prefix(format!("{repo} {revision}"));
        files.iter().for_each(|(path, content)| hasher.update([path.as_bytes(), content].concat()));
        let commit = hex(hasher.finalize());
        let mut state = self.state();
        let repo = state.repos.entry(repo.to_owned()).or_insert(Repo { access, revisions: BTreeMap::new() });
        repo.access = access;
        repo.revisions.insert(revision.to_owned(), Revision { commit, files });
        drop(state);
        self
    }

    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state().faults);
    }

    /// What was asked since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.state().asked)
    }

    /// Requests for content since the last call.
    pub fn fetched(&self) -> Vec<Asked> {
        self.asked().into_iter().filter(|asked| asked.path.contains("/resolve/")).collect()
    }

    pub fn commit(&self, repo: &str, revision: &str) -> String {
        self.state().repos[repo].revisions[revision].commit.clone()
    }
}

impl Drop for Hub {
    /// Afterwards connections are refused.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for (address, thread) in self.listeners.drain(..) {
            let _ = TcpStream::connect(address);
            let _ = thread.join();
        }
    }
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn entry(path: &str, content: &[u8]) -> Value {
    let git = hex(sha1::Sha1::digest([format!("blob {}\0", content.len()).as_bytes(), content].concat()));
    if content.len() <= LARGE {
        return json!({"type": "file", "oid": git, "size": content.len(), "path": path});
    }
    let lfs = json!({"oid": hex(sha2::Sha256::digest(content)), "size": content.len(), "pointerSize": 134});
    json!({"type": "file", "oid": "0".repeat(40), "size": content.len(), "path": path, "lfs": lfs})
}

fn answer(stream: TcpStream, state: &Mutex<State>, is_storage: bool) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let token = headers.get("authorization").map(|value| value.trim_start_matches("Bearer ").to_owned());
    let range = headers.get("range").cloned();
    let mut state = state.lock().unwrap();
    let asked = Asked { path: path.clone(), range: range.clone(), has_token: token.is_some(), is_storage };
    state.asked.push(asked);
    let reply = state.reply(&path, token.as_deref(), range.as_deref(), is_storage);
    drop(state);
    let length = reply.length.unwrap_or(reply.body.len());
    let mut out = stream;
    write!(out, "HTTP/1.1 {}\r\ncontent-length: {length}\r\nconnection: close\r\n", reply.status)?;
    for (name, value) in &reply.headers {
        write!(out, "{name}: {value}\r\n")?;
    }
    out.write_all(b"\r\n")?;
    out.write_all(&reply.body)?;
    out.flush()
}

struct Reply {
    status: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// When the body is cut off.
    length: Option<usize>,
}

impl Reply {
    fn json(value: &Value) -> Self {
        Self { status: "200 OK".into(), headers: vec![], body: value.to_string().into_bytes(), length: None }
    }

    fn refuse(status: &str, code: &str, message: &str) -> Self {
        let headers = vec![("x-error-code", code.to_owned()), ("x-error-message", message.to_owned())];
        Self { status: status.into(), headers, body: json!({"error": message}).to_string().into_bytes(), length: None }
    }
}

impl State {
    fn reply(&mut self, path: &str, token: Option<&str>, range: Option<&str>, is_storage: bool) -> Reply {
        if let Some(status) = self.faults.status {
            return Reply::refuse(status, "", "");
        }
        if self.faults.not_json {
            return Reply {
                body: b"<html>Welcome to the hotel's network</html>".to_vec(),
                ..Reply::json(&Value::Null)
            };
        }
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        if is_storage {
            let (repo, revision, file) = locate(path.trim_start_matches('/'), "/resolve/");
            return self.content(&repo, &revision, &file, range);
        }
        if token.is_some_and(|token| token != TOKEN && token != STRANGER) {
            return Reply::refuse("401 Unauthorized", "", "Invalid credentials in Authorization header");
        }
        let path = path.trim_start_matches('/');
        let (repo, revision, rest, is_api) = match path.strip_prefix("api/") {
            Some(path) if path.contains("/tree/") => {
                let (repo, revision, _) = locate(path, "/tree/");
                (repo, revision, "tree".to_owned(), true)
            }
            Some(path) => {
                let (repo, revision, _) = locate(path, "/revision/");
                (repo, revision, "info".to_owned(), true)
            }
            None => {
                let (repo, revision, file) = locate(path, "/resolve/");
                let repo = if repo.starts_with("datasets/") { repo } else { format!("models/{repo}") };
                (repo, revision, file, false)
            }
        };
        let missing = match token {
            Some(_) => Reply::refuse("404 Not Found", "RepoNotFound", "Repository not found"),
            None => Reply::refuse("401 Unauthorized", "RepoNotFound", "Invalid username or password."),
        };
        let Some(found) = self.repos.get(&repo) else { return missing };
        match found.access {
            Access::Private if token != Some(TOKEN) => return missing,
            Access::Gated if !is_api && token.is_none() => {
                let said = "Access to this model is restricted. You must have access to it and be authenticated.";
                return Reply::refuse("401 Unauthorized", "GatedRepo", said);
            }
            Access::Gated if !is_api && token != Some(TOKEN) => {
                return Reply::refuse("403 Forbidden", "GatedRepo", "Access to this model is restricted.");
            }
            _ => {}
        }
        let Some(Revision { commit, files }) = found.at(&revision) else {
            return Reply::refuse("404 Not Found", "RevisionNotFound", &format!("Invalid rev id: {revision}"));
        };
        match rest.as_str() {
            "info" if is_api => {
                Reply::json(&json!({"id": repo, "sha": commit, "gated": found.access == Access::Gated}))
            }
            "tree" if is_api => {
                let from: usize = query.split_once("cursor=").map_or(0, |(_, cursor)| cursor.parse().unwrap());
                let mut entries: Vec<_> = files.iter().map(|(path, content)| entry(path, content)).collect();
                entries.push(json!({"type": "directory", "oid": "0".repeat(40), "size": 0, "path": "a folder"}));
                entries.extend(self.faults.listed.clone());
                let page: Vec<_> = entries.iter().skip(from).take(PAGE).collect();
                let mut reply = Reply::json(&json!(page));
                if from + PAGE < entries.len() {
                    let next =
                        format!("<https://elsewhere.invalid/x?recursive=true&cursor={}>; rel=\"next\"", from + PAGE);
                    reply.headers.push(("link", next));
                }
                reply
            }
            file => {
                let Some(content) = files.get(file) else {
                    return Reply::refuse("404 Not Found", "EntryNotFound", "Entry not found");
                };
                if content.len() <= LARGE {
                    return self.content(&repo, &revision, file, range);
                }
                let location = format!("{}/{repo}/resolve/{revision}/{file}", self.storage);
                Reply { status: "302 Found".into(), headers: vec![("location", location)], body: vec![], length: None }
            }
        }
    }

    fn content(&mut self, repo: &str, revision: &str, file: &str, range: Option<&str>) -> Reply {
        let mut content = self.repos[repo].at(revision).unwrap().files[file].clone();
        if self.faults.damage.contains(file) {
            let middle = content.len() / 2;
            content[middle] ^= 1;
        }
        let total = content.len();
        let start = range.filter(|_| !self.faults.ignore_ranges).map(|range| {
            range.trim_start_matches("bytes=").trim_end_matches('-').parse::<usize>().expect("a range of the rest")
        });
        let mut reply = Reply { body: content.split_off(start.unwrap_or(0)), ..Reply::json(&Value::Null) };
        if let Some(start) = start {
            reply.status = "206 Partial Content".into();
            reply.headers.push(("content-range", format!("bytes {start}-{}/{total}", total - 1)));
        }
        if let Some((bytes, times)) = self.faults.cut.get_mut(file)
            && *times > 0
        {
            *times -= 1;
            reply.length = Some(reply.body.len());
            reply.body.truncate(*bytes);
        }
        reply
    }
}

/// Repository, revision and the rest of an address.
fn locate(path: &str, between: &str) -> (String, String, String) {
    let (repo, rest) = path.split_once(between).unwrap_or((path, ""));
    let (revision, rest) = rest.split_once('/').unwrap_or((rest, ""));
    (repo.to_owned(), revision.replace("%2F", "/"), rest.replace("%20", " "))
}

/// The files of a folder, for [`Hub::add`].
pub fn files_of(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect()
}

/// Rows shaped like XSum's, made up, as Parquet.
pub fn xsum(rows: std::ops::Range<usize>) -> Vec<u8> {
    use arrow::array::{ArrayRef, RecordBatch, StringArray};
    const NOUNS: [&str; 8] = ["parser", "library", "command", "server", "editor", "format", "compiler", "tool"];
    const VERBS: [&str; 8] = ["reads", "writes", "checks", "sorts", "prints", "counts", "copies", "finds"];
    let summary = |i: usize| format!("A {} that {} text, number {i}.", NOUNS[i % 8], VERBS[i / 8 % 8]);
    let document = |i: usize| format!("The {} {} text files.\n", NOUNS[i % 8], VERBS[i / 8 % 8]).repeat(1 + i % 4);
    let texts =
        |of: &dyn Fn(usize) -> String| -> ArrayRef { Arc::new(StringArray::from_iter_values(rows.clone().map(of))) };
    let batch = RecordBatch::try_from_iter([
        ("document", texts(&document)),
        ("summary", texts(&summary)),
        ("id", texts(&|i| (10_000_000 + i).to_string())),
    ])
    .unwrap();
    let mut bytes = vec![];
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    bytes
}

/// A data set like `EdinburghNLP/xsum`: a program that makes its rows, and on the side the hub's conversion of 200 rows, in
/// two shards for training.
pub fn add_xsum(hub: &Hub) {
    let repo = "datasets/EdinburghNLP/xsum";
    hub.add(
        repo,
        Access::Public,
        "main",
        [
            ("xsum.py", b"raise SystemExit('never run')".to_vec()),
            ("data/XSUM-EMNLP18-Summary-Data-Original.tar.gz", vec![7; 3000]),
            ("README.md", b"---\nlanguage: en\n---\n# XSum".to_vec()),
        ],
    );
    hub.add(
        repo,
        Access::Public,
        "refs/convert/parquet",
        [
            ("default/train/0000.parquet", xsum(0..100)),
            ("default/train/0001.parquet", xsum(100..160)),
            ("default/validation/0000.parquet", xsum(160..180)),
            ("default/test/0000.parquet", xsum(180..200)),
        ],
    );
}
