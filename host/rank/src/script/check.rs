//! `host check`: what can be said of a guest without running it.

use std::collections::{BTreeMap, BTreeSet};

use host::config::plan::{CheckPlan, GuestLimits};
use host::worker::StopFlag;
use host::{Error, Result};
use rhai::{AST, ASTNode, Engine, Expr, Stmt};
use serde_json::json;

use super::api::HostState;
use super::guest::{self, Guest, SDK_VERSION, World};
use super::loss::loss_engine;
use super::rhai::{parse, recipe_engine};
use super::template::{digest, template_engine};
use super::wasm;

/// Prints what a guest is, or says what is wrong with it.
pub fn check(plan: &CheckPlan) -> Result<()> {
    let path = &plan.path;
    // Told apart first; what is of no world is read as a recipe, whose errors say so.
    let bytes = guest::bytes_of(path, "guest")?;
    let script = (!bytes.starts_with(b"\0asm")).then(|| String::from_utf8_lossy(&bytes).into_owned());
    let world = match &script {
        Some(text) => world_of_script(text),
        None => guest::world_of(&bytes),
    };
    let world = world.unwrap_or(World::Recipe);
    let (digest, size) = (digest(&bytes), bytes.len());
    let guest = guest::of_bytes(path, bytes, world)?;
    let (form, imports, functions) = match &guest {
        Guest::Component(bytes) => {
            wasm::compile(path, bytes)?;
            ("Wasm component", guest::imports_of(bytes), vec![])
        }
        Guest::Script(text) => {
            let engine = engine_of(world);
            let script = parse(path, text, &engine)?;
            check_calls(path, &engine, &script)?;
            let functions = script.iter_functions().map(|f| format!("{}({})", f.name, f.params.join(", ")));
            // They come in an order that changes.
            ("Rhai script", vec![], functions.collect::<BTreeSet<_>>().into_iter().collect())
        }
    };
    let text = if plan.json {
        json!({
            "file": path, "kind": world.noun(), "form": form, "bytes": size, "digest": digest, "sdk": SDK_VERSION,
            "imports": imports, "functions": functions,
        })
        .to_string()
    } else {
        let mut text = format!(
            "{}: a {}, {form}, {} bytes\ndigest     {digest}\nhost:sdk   {SDK_VERSION}",
            path.display(),
            world.noun(),
            size
        );
        for (name, list) in [("imports", &imports), ("functions", &functions)] {
            for (index, item) in list.iter().enumerate() {
                text += &format!("\n{:<10} {item}", if index == 0 { name } else { "" });
            }
        }
        text
    };
    host::cli::ui::out(&text)
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
    if defines("render", &[1]) {
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
fn check_calls(path: &std::path::Path, engine: &Engine, script: &AST) -> Result<()> {
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
