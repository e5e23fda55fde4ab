//! One contract, three places: WIT, the Rhai engine and the reference page say the same.

use std::collections::BTreeSet;

use host_rank::script::rhai::signatures;
use wit_parser::{FunctionKind, Resolve, WorldItem};

use crate::support::root;

/// Every function of the world `recipe` as `interface resource.name`, straight from the WIT.
pub fn contract() -> BTreeSet<(String, String)> {
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_dir(root().join("sdk/wit/0.1.0")).unwrap();
    let world = resolve.select_world(&[package], Some("recipe")).unwrap();
    let mut functions = BTreeSet::new();
    for item in resolve.worlds[world].imports.values() {
        let WorldItem::Interface { id, .. } = item else { continue };
        for function in resolve.interfaces[*id].functions.values() {
            let of = match function.kind {
                FunctionKind::Method(id) => resolve.types[id].name.clone().unwrap(),
                _ => "host".into(),
            };
            functions.insert((of, function.item_name().to_string()));
        }
    }
    functions
}

#[test]
fn rhai_has_the_contract_and_nothing_else() {
    const OPERATORS: &[&str] = &["+", "-", "*", "/"];
    const ITERATORS: &[(&str, &str)] = &[("run", "steps"), ("step", "batches")];
    let mut found = BTreeSet::new();
    for signature in signatures() {
        let (name, rest) = signature.split_once('(').unwrap();
        // With a number first, an operator is no method.
        if OPERATORS.contains(&name) {
            continue;
        }
        let (of, name) = match name.strip_prefix("host::") {
            Some(name) => ("host".to_string(), name),
            None => {
                let of = rest.strip_prefix("self: ").and_then(|rest| rest.split([',', ')']).next());
                (of.unwrap_or_else(|| panic!("no resource in `{signature}`")).to_lowercase(), name)
            }
        };
        let name = name.strip_prefix("get$").unwrap_or(name);
        if ITERATORS.contains(&(of.as_str(), name)) {
            continue;
        }
        found.insert((of, name.replace('_', "-")));
    }
    assert_eq!(found, contract());
}

#[test]
fn a_template_has_what_its_definitions_say() {
    // Without what it gives back, and of a setter the name alone: Rhai does not know what its value is called.
    let plain = |signature: &str| {
        let call = signature.trim_start_matches("fn ").split(" ->").next().unwrap();
        let call = call.replace("get ", "get$").replace("set ", "set$").replace("self: ", "").replace("array", "Array");
        call.strip_prefix("set$").map_or(call.clone(), |setter| format!("set${}", setter.split('(').next().unwrap()))
    };
    let declared: BTreeSet<String> =
        crate::sdk_gen::TEMPLATE_FUNCTIONS.iter().map(|(declaration, _)| plain(declaration)).collect();
    let registered =
        host_rank::script::template::signatures().into_iter().filter(|signature| !signature.starts_with("host::"));
    let registered: BTreeSet<String> = registered.map(|signature| plain(&signature)).collect();
    assert_eq!(registered, declared);
}

#[test]
fn the_reference_has_the_contract() {
    let page = std::fs::read_to_string(root().join("sdk/REFERENCE.md")).unwrap();
    let definitions = std::fs::read_to_string(root().join("sdk/rhai/host.d.rhai")).unwrap();
    for (of, name) in contract() {
        let row = match of.as_str() {
            "host" => format!("|  | `{name}: func("),
            _ => format!("| `{of}` | `{name}: func("),
        };
        assert!(page.contains(&row), "the reference misses {of}.{name}");
        let name = name.replace('-', "_");
        assert!(
            definitions.contains(&format!("fn {name}(")) || definitions.contains(&format!("fn get {name}(")),
            "the definition file misses {of}.{name}"
        );
    }
}

#[test]
fn generated_files_are_current() {
    crate::sdk_gen::generate(&root(), true).unwrap();
}

#[test]
fn every_function_is_documented() {
    let page = std::fs::read_to_string(root().join("sdk/REFERENCE.md")).unwrap();
    let undocumented: Vec<&str> = page.lines().filter(|line| line.starts_with('|') && line.ends_with("|  |")).collect();
    assert!(undocumented.is_empty(), "{undocumented:?}");
}
