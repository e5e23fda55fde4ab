//! `source: org/name`: which files of a repository are a data set's rows, and those files in the cache.
//!
//! The hub's own Parquet conversion of a data set is taken where there is one, because it needs no code of the data set;
//! else the repository's data files, as its card or their names say. Nothing of a repository is ever run.

use hf_hub::RepoType;
use serde::Deserialize;
use serde_json::Value;

use super::cache::CachedRepo;
use super::{Failure, Hub, Listing, RemoteFile, RepoId, Why, check_revision};
use crate::config::plan::{DataFile, DataFormat, DatasetPlan, HubDataPlan, PinnedRevision};
use crate::config::resolve::data_files::{NamedFile, by_names, format_of};
use crate::data::split;
use crate::error::{Error, Result};

/// The branch on which the hub keeps its conversion: `SUBSET/SPLIT/0000.parquet`.
const CONVERSION: &str = "refs/convert/parquet";
/// Splits that the conversion cut off.
const PARTIAL: &str = "partial-";
const CARD: &str = "README.md";
/// Far above any card's.
const MAX_CARD_BYTES: u64 = 16 << 20;

/// A mistake, and the key of the section it is about.
pub type Misfit = (&'static str, Error);

/// Finds the files of a plan's hub data set and writes them into the plan, with the commit they are of. What is not cached
/// is fetched, if it may be. Returns what the user should know.
pub fn settle(plan: &mut DatasetPlan, hub: &Hub, may_fetch: bool) -> Result<Option<String>, Misfit> {
    let Some(asked) = plan.hub.clone() else { return Ok(None) };
    // Whoever checks the plan says what is wrong with the split.
    let Ok(slices) = split::parse(&plan.split) else { return Ok(None) };
    let at_source = |error| ("source", error);
    let repo = RepoId::new(&asked.repo, RepoType::Dataset).map_err(at_source)?;
    if let Some(revision) = &asked.revision {
        check_revision(revision).map_err(|error| ("revision", error))?;
    }
    let finder = Finder { hub, may_fetch, cache: CachedRepo::open(&repo).map_err(at_source)?, repo: &repo };
    let Some(found) = finder.find(&asked, &plan.format)? else {
        return Ok(Some(format!("`{repo}` is not in the cache; a run fetches it from the hub")));
    };
    for slice in &slices {
        if !found.files.iter().any(|file| file.split == slice.split) {
            let mut splits: Vec<_> = found.files.iter().map(|file| file.split.as_str()).collect();
            splits.dedup();
            let error = Error::config(format!("the data set `{repo}` has no split `{}`", slice.split));
            return Err(("split", error.hint(format!("it has: {}", splits.join(", ")))));
        }
    }
    let needed: Vec<_> = found.files.iter().filter(|file| slices.iter().any(|s| s.split == file.split)).collect();
    let remote = |file: &NamedFile| found.listing.files.iter().find(|remote| remote.path == file.path);
    let remotes: Vec<&RemoteFile> = needed.iter().filter_map(|file| remote(file)).collect();
    let missing: Vec<_> = remotes.iter().filter(|file| !finder.cache.has(&found.listing, file)).collect();
    if !missing.is_empty() && !may_fetch {
        let bytes: u64 = missing.iter().map(|file| file.size).sum();
        let (count, size) = (missing.len(), indicatif::HumanBytes(bytes));
        return Ok(Some(format!(
            "{count} files of `{repo}` are not in the cache; a run fetches them from the hub ({size})"
        )));
    }
    finder.cache.fetch(hub, &found.listing, &remotes).map_err(at_source)?;

    let file = |(file, remote): (&&NamedFile, &&RemoteFile)| DataFile {
        split: file.split.clone(),
        path: finder.cache.path(&found.listing, remote),
    };
    plan.files = needed.iter().zip(&remotes).map(file).collect();
    plan.format = found.format;
    let commit = found.listing.commit;
    let notice = found
        .is_stale
        .then(|| format!("the hub cannot be asked; `{repo}` is taken as it was cached, at commit {}", &commit[..12]));
    plan.hub = Some(HubDataPlan { pinned: Some(PinnedRevision { revision: found.revision, commit }), ..asked });
    Ok(notice)
}

/// The data files of a repository at a commit.
struct FoundFiles {
    listing: Listing,
    revision: String,
    /// The hub could not be asked whether this is still what the revision names.
    is_stale: bool,
    files: Vec<NamedFile>,
    format: DataFormat,
}

struct Finder<'a> {
    hub: &'a Hub,
    may_fetch: bool,
    repo: &'a RepoId,
    cache: CachedRepo<'a>,
}

impl Finder<'_> {
    /// `None`: nothing is cached, and nothing may be fetched.
    fn find(&self, asked: &HubDataPlan, format: &DataFormat) -> Result<Option<FoundFiles>, Misfit> {
        let own = asked.revision.as_deref().unwrap_or("main");
        // The conversion is of what `main` holds now.
        if own == "main"
            && asked.data_files.is_empty()
            && let Some((listing, is_stale)) = self.listing(CONVERSION)?
            && let Some(files) = self.conversion(&listing, asked)?
        {
            let (revision, format) = (CONVERSION.to_owned(), DataFormat::Parquet);
            return Ok(Some(FoundFiles { listing, revision, is_stale, files, format }));
        }
        let Some((listing, is_stale)) = self.listing(own)? else { return Ok(None) };
        // A commit of the conversion, as a run's record gives it.
        if asked.data_files.is_empty()
            && is_conversion(&listing)
            && let Some(files) = self.conversion(&listing, asked)?
        {
            let (revision, format) = (own.to_owned(), DataFormat::Parquet);
            return Ok(Some(FoundFiles { listing, revision, is_stale, files, format }));
        }
        let (files, found) = self.own_files(&listing, asked)?;
        let format = match (format, found) {
            (DataFormat::JsonField(field), DataFormat::Jsonl) => DataFormat::JsonField(field.clone()),
            (_, found) => found,
        };
        Ok(Some(FoundFiles { listing, revision: own.to_owned(), is_stale, files, format }))
    }

    /// What a revision holds, and whether that is only what it held once. `None`: there is no conversion, or nobody to ask.
    fn listing(&self, revision: &str) -> Result<Option<(Listing, bool)>, Misfit> {
        let cached = self.cache.listing(revision);
        if !self.may_fetch || cached.as_ref().is_some_and(|listing| listing.commit == revision) {
            return Ok(cached.map(|listing| (listing, false)));
        }
        match self.hub.listing(self.repo, revision) {
            Ok(listing) => {
                self.cache.keep_listing(revision, &listing).map_err(|error| ("source", error))?;
                Ok(Some((listing, false)))
            }
            Err(Failure { why: Why::NoRevision, .. }) if revision == CONVERSION => Ok(None),
            Err(Failure { why: Why::Unreachable, error }) => match cached {
                Some(listing) => Ok(Some((listing, true))),
                None if revision == CONVERSION => Ok(None),
                None => Err(("source", error.hint(format!("nothing of `{}` is in the cache", self.repo)))),
            },
            Err(Failure { why: Why::NoRevision, error }) => Err(("revision", error)),
            Err(Failure { why: Why::NoRepository, error }) => {
                Err(("source", error.hint(format!("there is no folder `{}` here either", self.repo))))
            }
            Err(failure) => Err(("source", failure.error)),
        }
    }

    /// The files of a subset in the hub's conversion; `None` when it is cut off.
    fn conversion(&self, listing: &Listing, asked: &HubDataPlan) -> Result<Option<Vec<NamedFile>>, Misfit> {
        let mut files: Vec<(&str, NamedFile)> = vec![];
        for file in &listing.files {
            if let Some((subset, split)) = converted(&file.path) {
                files.push((subset, NamedFile { split: split.to_owned(), path: file.path.clone() }));
            }
        }
        let subsets: Vec<_> = files.iter().map(|(subset, _)| *subset).collect();
        if subsets.is_empty() {
            return Ok(None);
        }
        let subset = self.subset(&subsets, asked, None)?;
        let mut files: Vec<_> = files.into_iter().filter(|(name, _)| *name == subset).map(|(_, file)| file).collect();
        files.sort_by(|a, b| (&a.split, &a.path).cmp(&(&b.split, &b.path)));
        let is_whole = files.iter().all(|file| !file.split.starts_with(PARTIAL));
        Ok(is_whole.then_some(files))
    }

    /// Chooses among subsets: by name, else the only one, else the default.
    fn subset<'s>(
        &self,
        subsets: &[&'s str],
        asked: &HubDataPlan,
        default: Option<&'s str>,
    ) -> Result<&'s str, Misfit> {
        let mut names = subsets.to_vec();
        names.sort_unstable();
        names.dedup();
        let chosen = match &asked.name {
            Some(name) => names.iter().find(|known| *known == name).copied(),
            None if names.len() == 1 => names.first().copied(),
            None => default.or_else(|| names.iter().find(|name| **name == "default").copied()),
        };
        chosen.ok_or_else(|| {
            let error = match &asked.name {
                Some(name) => Error::config(format!("the data set `{}` has no subset `{name}`", self.repo)),
                None => Error::config(format!("the data set `{}` has several subsets", self.repo)),
            };
            let key = if asked.name.is_some() { "name" } else { "source" };
            (key, error.hint(format!("give `name`, one of: {}", names.join(", "))))
        })
    }

    fn own_files(&self, listing: &Listing, asked: &HubDataPlan) -> Result<(Vec<NamedFile>, DataFormat), Misfit> {
        let paths: Vec<&str> = listing.files.iter().map(|file| file.path.as_str()).collect();
        if !asked.data_files.is_empty() {
            let patterns = asked.data_files.iter();
            let patterns: Vec<_> = patterns.map(|file| (file.split.clone(), file.path.display().to_string())).collect();
            return self.matching(&paths, &patterns).map_err(|error| ("data_files", error));
        }
        let subsets = self.card(listing)?;
        if !subsets.is_empty() {
            let names: Vec<_> = subsets.iter().map(|subset| subset.config_name.as_str()).collect();
            let default = subsets.iter().find(|subset| subset.default).map(|subset| subset.config_name.as_str());
            let name = self.subset(&names, asked, default)?;
            let subset = subsets.iter().find(|subset| subset.config_name == name);
            let patterns = subset.map(Subset::patterns).unwrap_or_default();
            if !patterns.is_empty() {
                return self.matching(&paths, &patterns).map_err(|error| ("source", error));
            }
        }
        let inside = match &asked.name {
            Some(name) if subsets.is_empty() => format!("{name}/"),
            _ => String::new(),
        };
        let below = paths.iter().copied().filter(|path| path.starts_with(&inside));
        if let Some(found) = by_names(below) {
            return Ok(found);
        }
        if let Some(name) = &asked.name {
            let error = Error::config(format!("the data set `{}` has no subset `{name}`", self.repo));
            return Err(("name", error.hint("leave `name` out, or give `data_files`")));
        }
        let error = Error::config(format!("the data set `{}` has no file that can be read", self.repo));
        let script = paths.iter().find(|path| path.ends_with(".py"));
        Err(("source", match script {
            Some(script) => error
                .cause(format!("its rows are made by the program `{script}`, which is never run, and the hub has not converted all of them"))
                .hint("make its rows into jsonl files yourself, and give their folder"),
            None => error.hint("jsonl, json, csv, parquet and txt files are read; those of other programs have to be converted"),
        }))
    }

    /// The files that patterns match; one without `*` is a name.
    fn matching(&self, paths: &[&str], patterns: &[(String, String)]) -> Result<(Vec<NamedFile>, DataFormat)> {
        let mut files = vec![];
        for (split, pattern) in patterns {
            let pattern = pattern.trim_start_matches("./");
            let matcher = globset::GlobBuilder::new(pattern)
                .literal_separator(true)
                .build()
                .map_err(|error| Error::config(format!("`{pattern}` is not a pattern of file names")).cause(error))?;
            let matcher = matcher.compile_matcher();
            let before = files.len();
            let mut matching: Vec<_> =
                paths.iter().filter(|path| matcher.is_match(path) || **path == pattern).collect();
            matching.sort_unstable();
            files.extend(matching.into_iter().map(|path| NamedFile { split: split.clone(), path: (*path).to_owned() }));
            if files.len() == before {
                return Err(Error::config(format!("no file of the data set `{}` matches `{pattern}`", self.repo)));
            }
        }
        let format = files.iter().find_map(|file| format_of(&file.path)).ok_or_else(|| {
            Error::config(format!("the data files of `{}` are of no kind that is read", self.repo))
                .hint("jsonl, json, csv, parquet and txt files are read")
        })?;
        // Beside the rows a wide pattern may match a card or an image.
        files.retain(|file| format_of(&file.path).as_ref() == Some(&format));
        Ok((files, format))
    }

    /// The subsets a repository's card describes; none when it does not, or is not cached and may not be fetched.
    fn card(&self, listing: &Listing) -> Result<Vec<Subset>, Misfit> {
        let Some(file) = listing.files.iter().find(|file| file.path == CARD && file.size < MAX_CARD_BYTES) else {
            return Ok(vec![]);
        };
        if self.may_fetch {
            self.cache.fetch(self.hub, listing, &[file]).map_err(|error| ("source", error))?;
        }
        let text = std::fs::read_to_string(self.cache.path(listing, file)).unwrap_or_default();
        let head = text.strip_prefix("---").and_then(|rest| rest.split_once("\n---")).map_or("", |(head, _)| head);
        // What the card says besides, and cards that say it in another way, are not ours to judge.
        let card: Card = serde_yaml::from_str(head).unwrap_or_default();
        Ok(card.configs.into_iter().filter_map(|config| serde_json::from_value(config).ok()).collect())
    }
}

/// Subset and split of a file of the conversion.
fn converted(path: &str) -> Option<(&str, &str)> {
    let mut parts = path.split('/');
    let (subset, split, name) = (parts.next()?, parts.next()?, parts.next()?);
    let number = name.strip_suffix(".parquet")?;
    let is_number = number.len() >= 4 && number.bytes().all(|byte| byte.is_ascii_digit());
    (is_number && parts.next().is_none()).then_some((subset, split))
}

fn is_conversion(listing: &Listing) -> bool {
    let mut files = listing.files.iter().filter(|file| !file.path.starts_with('.')).peekable();
    files.peek().is_some() && files.all(|file| converted(&file.path).is_some())
}

#[derive(Default, Deserialize)]
struct Card {
    #[serde(default)]
    configs: Vec<Value>,
}

#[derive(Deserialize)]
struct Subset {
    config_name: String,
    #[serde(default)]
    data_files: Value,
    #[serde(default)]
    default: bool,
}

impl Subset {
    /// `data_files` as split and pattern: a pattern, a list of them, or a list of `{split, path}`.
    fn patterns(&self) -> Vec<(String, String)> {
        let texts = |value: &Value| -> Vec<String> {
            let one = |value: &Value| value.as_str().map(str::to_owned);
            value
                .as_array()
                .map_or_else(|| one(value).into_iter().collect(), |all| all.iter().filter_map(one).collect())
        };
        let of_split = |entry: &Value| -> Vec<(String, String)> {
            let split = entry["split"].as_str().unwrap_or("train");
            texts(&entry["path"]).into_iter().map(|path| (split.to_owned(), path)).collect()
        };
        let plain = texts(&self.data_files).into_iter().map(|path| ("train".to_owned(), path));
        plain.chain(self.data_files.as_array().into_iter().flatten().flat_map(of_split)).collect()
    }
}
