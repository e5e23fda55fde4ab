//! `host check` and `host inspect`: what can be said of a guest without running it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use host::config::metadata::{Key, Metadata, shown};
use host::config::plan::{CheckPlan, CheckStyle, GuestLimits};
use host::worker::StopFlag;
use host::{Error, Result};
use rhai::{AST, ASTNode, Engine, Expr, Stmt};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::api::HostState;
use super::guest::{self, Guest, SDK_VERSION, World};
use super::loss::loss_engine;
use super::rhai::{parse, recipe_engine};
use super::template::{TAKES_SETTINGS, takes_settings, template_engine};
use super::wasm;

/// Prints what a guest is, or says what is wrong with it.
pub fn check(plan: &CheckPlan) -> Result<()> {
    let found = Found::of(&plan.path, plan.guest_mb)?;
    host::cli::ui::out(&match plan.style {
        CheckStyle::Verdict => found.verdict(),
        CheckStyle::Details => found.details(),
        CheckStyle::Json => found.to_json().to_string(),
    })
}

/// What there is to say of a guest that was not run.
struct Found {
    path: PathBuf,
    world: World,
    form: &'static str,
    bytes: usize,
    sha256: String,
    /// What it uses of its host: a component's imports, or what every script of its world may call.
    capabilities: Vec<String>,
    /// Of a script, with their parameters.
    functions: Vec<String>,
    metadata: Metadata,
}

impl Found {
    fn of(path: &Path, guest_mb: usize) -> Result<Self> {
        let limits = GuestLimits { guest_mb, ..GuestLimits::default() };
        // Told apart first; what is of no world is read as a recipe, whose errors say so.
        let bytes = guest::bytes_of(path, "guest", &limits)?;
        let world = world_of(&bytes).unwrap_or(World::Recipe);
        let (size, sha256) = (bytes.len(), format!("{:x}", Sha256::digest(&bytes)));
        let metadata = host::guest::metadata_of(path, &bytes)?;
        let (form, capabilities, functions) = match guest::of_bytes(path, bytes, world)? {
            Guest::Component(bytes) => {
                wasm::compile(path, &bytes, &limits)?;
                ("Wasm component", guest::imports_of(&bytes), vec![])
            }
            Guest::Script(text) => {
                let engine = engine_of(world);
                let script = parse(path, &text, &engine)?;
                check_calls(path, &engine, &script)?;
                if world == World::Template
                    && let Some(key) = metadata.keys.first()
                    && !takes_settings(&script)
                {
                    let what =
                        format!("the template `{}` names the key `{}`, and is not given it", path.display(), key.name);
                    let hint = format!("define `{TAKES_SETTINGS}`, or remove `[keys.{}]`", key.name);
                    return Err(Error::config(what).hint(hint));
                }
                let functions = script.iter_functions().map(|f| format!("{}({})", f.name, f.params.join(", ")));
                let granted = guest::granted(world).iter().map(|name| format!("{name}@{SDK_VERSION}"));
                // They come in an order that changes.
                ("Rhai script", granted.collect(), functions.collect::<BTreeSet<_>>().into_iter().collect())
            }
        };
        Ok(Self { path: path.to_owned(), world, form, bytes: size, sha256, capabilities, functions, metadata })
    }

    fn verdict(&self) -> String {
        let mut text = format!("{}: a {}, {}", self.path.display(), self.world.noun(), self.form);
        add_row(&mut text, "host:sdk", [format!("{SDK_VERSION}, and all that it uses is granted")]);
        add_row(&mut text, "keys", self.metadata.keys.iter().map(key_line));
        add_row(&mut text, "functions", self.functions.iter().cloned());
        text
    }

    fn details(&self) -> String {
        let Metadata { name, version, description, license, keys } = &self.metadata;
        let mut text = format!("{}: a {}, {}", self.path.display(), self.world.noun(), self.form);
        let texts = [("name", name), ("version", version), ("about", description), ("license", license)];
        for (heading, value) in texts {
            add_row(&mut text, heading, value.iter().flat_map(|value| value.lines()).map(str::to_owned));
        }
        add_row(&mut text, "keys", keys.iter().map(key_line));
        // What every component of Rust's library imports tells nothing: it is linked to nothing.
        let (sdk, inert): (Vec<&String>, Vec<_>) = self.capabilities.iter().partition(|name| name.starts_with("host:"));
        let inert = (!inert.is_empty()).then(|| format!("{} interfaces of WASI, linked to nothing", inert.len()));
        add_row(&mut text, "uses", sdk.into_iter().cloned().chain(inert));
        add_row(&mut text, "size", [format!("{} bytes", self.bytes)]);
        add_row(&mut text, "sha256", [self.sha256.clone()]);
        text
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "file": self.path, "kind": self.world.noun(), "form": self.form, "sdk": SDK_VERSION,
            "metadata": self.metadata, "capabilities": self.capabilities, "functions": self.functions,
            "bytes": self.bytes, "sha256": self.sha256,
        })
    }
}

fn add_row(text: &mut String, heading: &str, lines: impl IntoIterator<Item = String>) {
    for (index, line) in lines.into_iter().enumerate() {
        *text += &format!("\n{:<10} {line}", if index == 0 { heading } else { "" });
    }
}

/// `gamma = 2.0: a number, at least 0.0; how much less`
fn key_line(key: &Key) -> String {
    let default = match (&key.default, key.required) {
        (Some(default), _) => format!(" = {}", shown(default)),
        (None, true) => " (required)".to_owned(),
        (None, false) => " = null".to_owned(),
    };
    let doc = key.doc.as_ref().map(|doc| format!("; {doc}")).unwrap_or_default();
    format!("{}{default}: {}{doc}", key.name, key.expected())
}

/// The world of what may be a guest, by what a component exports or a script defines.
pub fn world_of(bytes: &[u8]) -> Option<World> {
    match bytes.starts_with(b"\0asm") {
        true => guest::world_of(bytes),
        false => world_of_script(&String::from_utf8_lossy(bytes)),
    }
}

/// By the functions that a template and a loss define.
fn world_of_script(text: &str) -> Option<World> {
    let script = engine_of(World::Recipe).compile(text).or_else(|_| engine_of(World::Template).compile(text)).ok()?;
    let defines = |name: &str, counts: &[usize]| {
        script.iter_functions().any(|function| function.name == name && counts.contains(&function.params.len()))
    };
    // A recipe may have helpers of those names.
    let mut main = script.clone();
    main.clear_functions();
    let mut opens = false;
    main.walk(&mut |nodes: &[ASTNode<'_>]| {
        opens |= matches!(nodes.last(), Some(ASTNode::Expr(Expr::FnCall(call, _)) | ASTNode::Stmt(Stmt::FnCall(call, _)))
            if call.name == "open" && !call.namespace.is_empty());
        true
    });
    if opens {
        return Some(World::Recipe);
    }
    if defines("render", &[1, 2]) {
        return Some(World::Template);
    }
    defines("loss", &[2, 3]).then_some(World::Loss)
}

fn engine_of(world: World) -> Engine {
    let limits = GuestLimits::default();
    let state = HostState::new("", &limits, StopFlag::default(), None);
    match world {
        World::Recipe => recipe_engine(state, &limits).0,
        World::Template => template_engine(state, &limits).0,
        World::Loss => loss_engine(state, &limits).0,
    }
}

/// Every function that is called must be there, and take as many arguments somewhere.
fn check_calls(path: &Path, engine: &Engine, script: &AST) -> Result<()> {
    let mut known: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for signature in engine.gen_fn_signatures(true) {
        let (name, rest) = signature.split_once('(').unwrap_or((&signature, ")"));
        let parameters = rest.rsplit_once(')').map_or("", |(parameters, _)| parameters);
        let count = if parameters.trim().is_empty() { 0 } else { parameters.split(',').count() };
        // `log(…)`, or `fn log(…)`; a getter is a property's.
        known.entry(name.trim_start_matches("fn ").trim().to_owned()).or_default().push(count);
    }
    // What the language has without a signature.
    for name in ["call", "curry", "is_shared", "type_of", "is_def_var", "is_def_fn", "Fn", "print", "debug", "eval"] {
        known.entry(name.to_owned()).or_default().extend(0..8);
    }
    // A function in a map is called as a method is.
    let mut keys = BTreeSet::new();
    script.walk(&mut |nodes: &[ASTNode<'_>]| {
        if let Some(ASTNode::Expr(Expr::Map(map, _))) = nodes.last() {
            keys.extend(map.0.iter().map(|(key, _)| key.name.to_string()));
        }
        true
    });
    let mut mistakes = vec![];
    script.walk(&mut |nodes: &[ASTNode<'_>]| {
        let (call, is_method, position) = match nodes.last() {
            Some(ASTNode::Expr(Expr::FnCall(call, position))) => (call, false, position),
            Some(ASTNode::Expr(Expr::MethodCall(call, position))) => (call, true, position),
            Some(ASTNode::Stmt(Stmt::FnCall(call, position))) => (call, false, position),
            _ => return true,
        };
        if call.op_token.is_some() {
            return true;
        }
        let name = match call.namespace.is_empty() {
            true => call.name.to_string(),
            false => format!("{}::{}", call.namespace, call.name),
        };
        // The object of a method is the first argument of the host's functions, and none of the script's own.
        let given = call.args.len();
        let own =
            script.iter_functions().filter(|function| function.name == name).map(|function| function.params.len());
        let host = known.get(&name).into_iter().flatten().map(|count| count.saturating_sub(usize::from(is_method)));
        let counts: BTreeSet<usize> = own.chain(host).collect();
        if counts.contains(&given) || (is_method && keys.contains(&name)) {
            return true;
        }
        let error = if counts.is_empty() {
            let error = Error::config(format!("there is no function `{name}`"));
            let own = script.iter_functions().map(|function| function.name);
            match host::config::suggest::nearest(
                &name,
                known
                    .keys()
                    .map(String::as_str)
                    .filter(|name| name.starts_with(|c: char| c.is_alphabetic()))
                    .chain(own),
            ) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint("`sdk/REFERENCE.md` lists what there is"),
            }
        } else {
            let counts = counts.iter().map(usize::to_string).collect::<Vec<_>>().join(" or ");
            let arguments = if given == 1 { "argument" } else { "arguments" };
            Error::config(format!("`{name}` is given {given} {arguments}, and takes {counts}"))
        };
        mistakes.push(error.at(path, position.line(), position.position()));
        true
    });
    Error::all(mistakes).map_or(Ok(()), Err)
}
