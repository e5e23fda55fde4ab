//! The Hugging Face hub: what a repository holds, its files, and the cache that every tool of the hub shares.
//!
//! `hf-hub` knows the names: folders of the cache, addresses, the token's file. Requests are made here, with the HTTP client
//! it uses, because its downloads neither check what arrived nor notice a server that ignores a range, and its errors do
//! not tell a gated repository from a missing one.
//!
//! A token is never printed, logged, or sent to another host than the one it was given for.

pub mod cache;
pub mod dataset;
pub mod fetch;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Repo, RepoType};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use ureq::Agent;
use ureq::http::{Response, StatusCode};
use ureq::tls::{PemItem, RootCerts, TlsConfig};

use crate::error::{Error, Result};

const OFFICIAL: &str = "https://huggingface.co";

/// A list of files is at most this long.
const MAX_JSON_BYTES: u64 = 256 << 20;

/// A repository's name and kind.
#[derive(Clone, Debug)]
pub struct RepoId {
    id: String,
    repo_type: RepoType,
}

impl RepoId {
    pub fn new(id: &str, repo_type: RepoType) -> Result<Self> {
        let is_name = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
                && !part.contains("..")
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if id.len() > 96 || id.split('/').count() > 2 || !id.split('/').all(is_name) {
            return Err(Error::config(format!("`{id}` is not the name of a repository"))
                .hint("names are `org/name`, such as `meta-llama/Meta-Llama-3.1-8B-Instruct`"));
        }
        Ok(Self { id: id.to_owned(), repo_type })
    }

    /// What follows the organisation.
    pub fn name(&self) -> &str {
        self.id.rsplit('/').next().unwrap_or(&self.id)
    }

    fn at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), self.repo_type, revision.to_owned())
    }

    fn kind(&self) -> &'static str {
        if matches!(self.repo_type, RepoType::Dataset) { "data set" } else { "model" }
    }
}

/// Checks a branch, tag or commit. It becomes part of addresses and of names in the cache.
pub fn check_revision(revision: &str) -> Result<()> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./+@".contains(&byte);
    if revision.is_empty() || revision.starts_with('/') || revision.contains("..") || !revision.bytes().all(is_plain) {
        return Err(Error::config(format!("`{revision}` is not a revision"))
            .hint("a revision is a branch, a tag or a commit, such as `main`"));
    }
    Ok(())
}

/// Returns whether a revision is a commit, which never means anything else later.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

/// What a commit of a repository holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing {
    pub commit: String,
    pub files: Vec<RemoteFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteFile {
    /// Relative, without `..`.
    pub path: String,
    pub size: u64,
    pub digest: Digest,
}

/// What the hub says a file's content hashes to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Digest {
    /// Large files: of the content.
    Sha256(String),
    /// The others: git's, of a header with the size and the content.
    GitBlob(String),
}

impl Digest {
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }
}

/// Why the hub gave nothing, for those who can go on without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// No network, or a hub in trouble.
    Unreachable,
    NoRepository,
    NoRevision,
    Refused,
    Other,
}

#[derive(Debug)]
pub struct Failure {
    pub why: Why,
    pub error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { why: Why::Other, error }
    }
}

/// Who asks. Printing it shows where it is from, never what it is.
struct Token {
    secret: String,
    origin: String,
}

/// The hub as this process may use it.
pub struct Hub {
    agent: Agent,
    endpoint: String,
    token: Option<Token>,
    is_offline: bool,
}

impl Hub {
    /// Takes `HF_ENDPOINT`, `HF_HUB_OFFLINE`, and the token: `given`, else `HF_TOKEN`, else what `hf auth login` wrote.
    pub fn from_env(given: Option<&str>) -> Result<Self> {
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| OFFICIAL.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(Error::config(format!("HF_ENDPOINT is `{endpoint}`, which is no address"))
                .hint(format!("it is like `{OFFICIAL}`; unset it for the official hub")));
        }
        let agent = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(root_certs()?).build())
            .http_status_as_error(false)
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .user_agent(concat!("host/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            // A connection that says nothing for so long is dead; a slow one may go on.
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build()
            .into();
        Ok(Self { agent, endpoint, token: token(given)?, is_offline: is_offline() })
    }

    /// Lists what `revision` of a repository holds, and which commit it is.
    pub fn listing(&self, repo: &RepoId, revision: &str) -> Result<Listing, Failure> {
        let address = format!("{}/api/{}", self.endpoint, repo.at(revision).api_url());
        let (info, _) = self.json(&address, repo, revision)?;
        let commit = info["sha"].as_str().filter(|sha| is_commit(sha));
        let commit = commit.ok_or_else(|| self.odd("its description has no commit"))?;
        let plural = if matches!(repo.repo_type, RepoType::Dataset) { "datasets" } else { "models" };
        let tree = format!("{}/api/{plural}/{}/tree/{commit}", self.endpoint, repo.id);
        let (mut files, mut query) = (vec![], Some("recursive=true&expand=false".to_owned()));
        while let Some(page) = query {
            let (entries, next) = self.json(&format!("{tree}?{page}"), repo, revision)?;
            let entries = entries.as_array().ok_or_else(|| self.odd("its list of files is no list"))?;
            for entry in entries.iter().filter(|entry| entry["type"] == "file") {
                files.push(remote_file(entry).ok_or_else(|| self.odd(&format!("it lists the file {entry}")))?);
            }
            query = next;
        }
        Ok(Listing { commit: commit.to_owned(), files })
    }

    /// Asks for a file from byte `from` on.
    fn file(&self, repo: &RepoId, commit: &str, file: &RemoteFile, from: u64) -> Result<Response<ureq::Body>, Failure> {
        let parts: Vec<String> = file.path.split('/').map(escape).collect();
        let address = format!("{}/{}/resolve/{commit}/{}", self.endpoint, repo.at(commit).url(), parts.join("/"));
        let mut request = self.agent.get(&address).header("accept-encoding", "identity");
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        self.send(request, repo, commit)
    }

    /// A JSON answer, and the query of the page after it.
    fn json(&self, address: &str, repo: &RepoId, revision: &str) -> Result<(Value, Option<String>), Failure> {
        let mut response = self.send(self.agent.get(address), repo, revision)?;
        // `<https://…?cursor=…>; rel="next"`. Only the query is taken: behind a mirror the address may be another host's.
        let link = response.headers().get("link").and_then(|link| link.to_str().ok());
        let next = link.filter(|link| link.contains("rel=\"next\"")).and_then(|link| {
            let (_, query) = link.split_once('<')?.1.split_once('>')?.0.split_once('?')?;
            Some(query.to_owned())
        });
        let body = response.body_mut().with_config().limit(MAX_JSON_BYTES).read_to_vec();
        let body = body.map_err(|error| self.unreachable(&error))?;
        let value = serde_json::from_slice(&body)
            .map_err(|error| self.odd("its answer is not JSON").cause(error).hint("is `HF_ENDPOINT` a hub?"))?;
        Ok((value, next))
    }

    fn send(
        &self,
        mut request: ureq::RequestBuilder<ureq::typestate::WithoutBody>,
        repo: &RepoId,
        revision: &str,
    ) -> Result<Response<ureq::Body>, Failure> {
        if self.is_offline {
            let error = Error::run(format!("`{repo}` is on the hub, and HF_HUB_OFFLINE forbids to ask it"))
                .hint("unset HF_HUB_OFFLINE, or fetch it on a machine that may");
            return Err(Failure { why: Why::Unreachable, error });
        }
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {}", token.secret));
        }
        let response = request.call().map_err(|error| self.unreachable(&error))?;
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            status => Err(self.refusal(status, &response, repo, revision)),
        }
    }

    fn unreachable(&self, error: &ureq::Error) -> Failure {
        let error = Error::run(format!("cannot reach the hub at `{}`", self.endpoint))
            .cause(error)
            .hint("check the network; HTTPS_PROXY names a proxy, SSL_CERT_FILE its certificates, HF_ENDPOINT a mirror");
        Failure { why: Why::Unreachable, error }
    }

    /// An answer that no hub gives.
    fn odd(&self, what: &str) -> Error {
        Error::run(format!("cannot use the answer of the hub at `{}`: {what}", self.endpoint))
    }

    /// What the hub means by a status. Its own code tells most; without a valid token it says 401 of whatever is missing.
    fn refusal(&self, status: StatusCode, response: &Response<ureq::Body>, repo: &RepoId, revision: &str) -> Failure {
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let (code, said) = (header("x-error-code"), header("x-error-message"));
        let (endpoint, kind) = (&self.endpoint, repo.kind());
        let page = format!("{endpoint}/{}", repo.at(revision).url());
        let answer = match said {
            "" => format!("the hub answered {status}"),
            said => format!("the hub answered {status}: {said}"),
        };
        let tokens = format!("{endpoint}/settings/tokens");
        let (why, error) = match (code, &self.token) {
            ("GatedRepo", None) => (
                Why::Refused,
                Error::config(format!("the {kind} `{repo}` is gated, and no token was given"))
                    .hint(format!("ask for access on {page}"))
                    .hint(format!(
                        "then make a token on {tokens} and give it as `--hf-token`, HF_TOKEN or by `hf auth login`"
                    )),
            ),
            ("GatedRepo", Some(token)) => (
                Why::Refused,
                Error::config(format!("the {kind} `{repo}` is gated, and the token of {} has no access", token.origin))
                    .hint(format!("ask for access on {page} with the account the token is of")),
            ),
            ("RevisionNotFound", _) => (
                Why::NoRevision,
                Error::config(format!("the {kind} `{repo}` has no revision `{revision}`"))
                    .hint(format!("its branches, tags and commits are on {page}")),
            ),
            ("EntryNotFound", _) => {
                (Why::Other, Error::config(format!("the {kind} `{repo}` lacks a file that it lists")))
            }
            _ if status == StatusCode::UNAUTHORIZED && said.starts_with("Invalid credentials") => {
                let origin = self.token.as_ref().map_or("nowhere", |token| &token.origin);
                let error = Error::config(format!("the hub does not accept the token of {origin}"));
                (Why::Refused, error.hint(format!("make a new one on {tokens}")))
            }
            ("RepoNotFound", _) => (Why::NoRepository, self.not_found(repo)),
            // What the hub says to strangers of everything that is not public.
            _ if status == StatusCode::UNAUTHORIZED || status == StatusCode::NOT_FOUND => {
                (Why::NoRepository, self.not_found(repo))
            }
            _ if status == StatusCode::FORBIDDEN => (
                Why::Refused,
                Error::config(format!("the hub forbids to read the {kind} `{repo}`"))
                    .hint(format!("see {page}; a token needs the right to read it")),
            ),
            _ if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                (Why::Unreachable, Error::run(format!("the hub at `{endpoint}` is in trouble")).hint("try again later"))
            }
            _ => (Why::Other, Error::run(format!("the hub refuses a request about the {kind} `{repo}`"))),
        };
        Failure { why, error: error.cause(answer) }
    }

    fn not_found(&self, repo: &RepoId) -> Error {
        let kind = repo.kind();
        let error = Error::config(format!("the hub has no {kind} `{repo}`, or none that may be seen"))
            .hint("check the name, capital letters too");
        match &self.token {
            None => error.hint("if it is private, give a token: `--hf-token`, HF_TOKEN or `hf auth login`"),
            Some(token) => error.hint(format!("if it is private, the token of {} has no access", token.origin)),
        }
    }
}

/// A file of the hub's list; `None` when it says too little, or a path that would lead elsewhere.
fn remote_file(entry: &Value) -> Option<RemoteFile> {
    let path = entry["path"].as_str()?;
    let is_plain = Path::new(path).components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if path.is_empty() || !is_plain || path.contains('\\') {
        return None;
    }
    let (digest, of): (fn(String) -> Digest, _) = match entry.get("lfs") {
        Some(lfs) if lfs.is_object() => (Digest::Sha256, &lfs["oid"]),
        _ => (Digest::GitBlob, &entry["oid"]),
    };
    let hex = of.as_str().filter(|hex| hex.len() >= 40 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    Some(RemoteFile { path: path.to_owned(), size: entry["size"].as_u64()?, digest: digest(hex.to_ascii_lowercase()) })
}

/// Writes a path's part as it goes into an address.
fn escape(part: &str) -> String {
    part.bytes().fold(String::new(), |out, byte| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out + &(byte as char).to_string(),
        _ => out + &format!("%{byte:02X}"),
    })
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// Whom to trust: the file that Python's and other tools are told of, for networks that have a certificate of their own;
/// else what the public web trusts.
fn root_certs() -> Result<RootCerts> {
    let names = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];
    let Some((name, path)) = names.iter().find_map(|name| Some((name, variable(name)?))) else {
        return Ok(RootCerts::WebPki);
    };
    let unusable = || Error::config(format!("{name} names `{path}`, which holds no certificates in PEM"));
    let pem = std::fs::read(&path).map_err(|error| unusable().cause(error))?;
    let certificates: Vec<_> = ureq::tls::parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(unusable().hint("unset it to trust what the public web trusts"));
    }
    Ok(RootCerts::from(certificates))
}

/// What Python's library takes for yes.
fn is_offline() -> bool {
    variable("HF_HUB_OFFLINE")
        .is_some_and(|value| ["1", "on", "yes", "true"].iter().any(|yes| value.eq_ignore_ascii_case(yes)))
}

fn token(given: Option<&str>) -> Result<Option<Token>> {
    let from_file = || {
        let path = match variable("HF_TOKEN_PATH") {
            Some(path) => PathBuf::from(path),
            None => cache::folder()?.token_path(),
        };
        let secret = std::fs::read_to_string(&path).ok()?;
        Some((secret, format!("`{}`", path.display())))
    };
    let found = given
        .map(|secret| (secret.to_owned(), "`--hf-token`".to_owned()))
        .or_else(|| Some((variable("HF_TOKEN")?, "HF_TOKEN".to_owned())))
        .or_else(from_file);
    let Some((secret, origin)) = found else { return Ok(None) };
    let secret = secret.trim().to_owned();
    if secret.is_empty() {
        return Ok(None);
    }
    if !secret.bytes().all(|byte| byte.is_ascii_graphic()) {
        // Not shown: part of it may be the token.
        return Err(Error::config(format!("what {origin} holds is no token: it has blanks or foreign letters"))
            .hint(format!("a token of the hub is like `hf_…`, see {OFFICIAL}/settings/tokens")));
    }
    Ok(Some(Token { secret, origin }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_repositories() {
        for id in ["gpt2", "EdinburghNLP/xsum", "a/b.c-d_e"] {
            assert_eq!(RepoId::new(id, RepoType::Model).unwrap().to_string(), id);
        }
        for id in ["", "/", "a/", "../b", "a/b/c", "a b/c", "a/..", "a/b?c", "https://huggingface.co/a/b"] {
            assert!(RepoId::new(id, RepoType::Model).is_err(), "{id}");
        }
    }

    #[test]
    fn listed_files_stay_in_their_folder() {
        let entry = |path: &str| serde_json::json!({"type": "file", "path": path, "size": 3, "oid": "0".repeat(40)});
        assert!(remote_file(&entry("a/b.txt")).is_some());
        for path in ["", "/etc/passwd", "../x", "a/../../x", "./a", "a\\b"] {
            assert!(remote_file(&entry(path)).is_none(), "{path}");
        }
        assert!(remote_file(&serde_json::json!({"path": "a", "size": 3})).is_none());
        assert!(remote_file(&serde_json::json!({"path": "a", "size": 3, "oid": "../../x".repeat(9)})).is_none());
    }

    #[test]
    fn names_in_addresses() {
        assert_eq!(escape("a b?#%é.txt"), "a%20b%3F%23%25%C3%A9.txt");
    }
}
