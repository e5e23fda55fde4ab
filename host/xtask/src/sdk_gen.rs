//! From the contract in `sdk/wit` to everything that repeats it: the Rhai bindings, the definition file that editors read,
//! and the reference page. The outputs are committed; a test regenerates and compares them.
//!
//! Only the shapes the contract uses are translated; another one is an error here, not a guess.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use wit_parser::{Function, FunctionKind, Handle, Interface, Resolve, Type, TypeDefKind, TypeId, TypeOwner, WorldItem};

const VERSION: &str = "0.1.0";

/// Writes the outputs, or with `check` only says which of them are stale.
pub fn generate(root: &Path, check: bool) -> Result<(), String> {
    let mut stale = vec![];
    for (path, content) in outputs(root)? {
        if std::fs::read_to_string(&path).is_ok_and(|current| current == content) {
            continue;
        }
        if check {
            stale.push(path.strip_prefix(root).unwrap_or(&path).display().to_string());
        } else {
            write(&path, &content)?;
        }
    }
    if stale.is_empty() {
        return Ok(());
    }
    Err(format!("out of date with `sdk/wit`: {}\nhint: run `cargo xtask sdk` and commit the result", stale.join(", ")))
}

fn write(path: &Path, content: &str) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("cannot write `{}`: {error}", path.display());
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(failed)?;
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, content).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)
}

/// The generated files and what they should hold.
pub fn outputs(root: &Path) -> Result<Vec<(PathBuf, String)>, String> {
    let wit = root.join("sdk/wit").join(VERSION);
    let mut resolve = Resolve::default();
    let (package, _) =
        resolve.push_dir(&wit).map_err(|error| format!("cannot parse `{}`: {error:#}", wit.display()))?;
    let recipe = resolve.select_world(&[package], Some("recipe")).map_err(|error| format!("{error:#}"))?;
    let mut interfaces = vec![];
    for (_, item) in &resolve.worlds[recipe].imports {
        if let WorldItem::Interface { id, .. } = item {
            interfaces.push(&resolve.interfaces[*id]);
        }
    }
    let exported = |name: &str| match resolve.packages[package].interfaces.get(name) {
        Some(id) => Ok(&resolve.interfaces[*id]),
        None => Err(format!("the contract has no interface `{name}`")),
    };
    let surface = Surface { resolve: &resolve, interfaces, rows: exported("rows")?, scoring: exported("scoring")? };
    Ok(vec![
        (root.join("host/rank/src/script/rhai_generated.rs"), surface.bindings()?),
        (root.join("sdk/rhai/host.d.rhai"), surface.definitions()?),
        (root.join("sdk/REFERENCE.md"), surface.reference()?),
    ])
}

struct Surface<'a> {
    resolve: &'a Resolve,
    interfaces: Vec<&'a Interface>,
    rows: &'a Interface,
    scoring: &'a Interface,
}

/// How a function of the contract appears in Rhai.
enum Form {
    /// `host::name(…)`
    Module,
    /// `object.name(…)`
    Method,
    /// `object.name`: it takes nothing and cannot fail.
    Property,
}

/// One function, by the names each side uses.
struct Call<'a> {
    function: &'a Function,
    interface: &'a str,
    form: Form,
    /// The resource it belongs to, as WIT writes it.
    resource: Option<&'a str>,
    /// `next_step`
    name: String,
    /// Parameters besides the resource itself: name and type.
    params: Vec<(String, Type)>,
    /// What it gives when it succeeds.
    gives: Option<Type>,
    fallible: bool,
}

impl<'a> Surface<'a> {
    fn calls(&self, interface: &'a Interface) -> Result<Vec<Call<'a>>, String> {
        let name = interface.name.as_deref().unwrap_or_default();
        interface.functions.values().map(|function| self.call(name, function)).collect()
    }

    fn call(&self, interface: &'a str, function: &'a Function) -> Result<Call<'a>, String> {
        let (resource, own_params) = match function.kind {
            FunctionKind::Freestanding => (None, 0),
            FunctionKind::Method(id) => (self.resolve.types[id].name.as_deref(), 1),
            _ => return Err(format!("`{}`: only functions and methods are translated", function.name)),
        };
        let (gives, fallible) = match function.result {
            Some(Type::Id(id)) => match &self.resolve.types[id].kind {
                TypeDefKind::Result(result) => (result.ok, true),
                _ => (function.result, false),
            },
            other => (other, false),
        };
        let params: Vec<(String, Type)> =
            function.params[own_params..].iter().map(|param| (snake(&param.name), param.ty)).collect();
        let form = match resource {
            None => Form::Module,
            Some(_) if params.is_empty() && !fallible => Form::Property,
            Some(_) => Form::Method,
        };
        Ok(Call { function, interface, form, resource, name: snake(function.item_name()), params, gives, fallible })
    }

    /// Follows aliases to the definition.
    fn definition(&self, mut id: TypeId) -> TypeId {
        while let TypeDefKind::Type(Type::Id(next)) = self.resolve.types[id].kind {
            id = next;
        }
        id
    }

    fn list_of(&self, ty: &Type, item: Type) -> bool {
        let Type::Id(id) = ty else { return false };
        matches!(self.resolve.types[self.definition(*id)].kind, TypeDefKind::List(of) if of == item)
    }

    /// The resource behind a handle, if `ty` is one.
    fn handle(&self, ty: &Type) -> Option<TypeId> {
        let Type::Id(id) = ty else { return None };
        match self.resolve.types[self.definition(*id)].kind {
            TypeDefKind::Handle(Handle::Own(of) | Handle::Borrow(of)) => Some(self.definition(of)),
            _ => None,
        }
    }

    fn type_name(&self, id: TypeId) -> Result<&'a str, String> {
        self.resolve.types[id].name.as_deref().ok_or_else(|| "a type without a name".to_string())
    }

    /// The module of `api` a named type lives in.
    fn module(&self, id: TypeId) -> Result<&'a str, String> {
        match self.resolve.types[id].owner {
            TypeOwner::Interface(interface) => {
                self.resolve.interfaces[interface].name.as_deref().ok_or_else(|| "an interface without a name".into())
            }
            _ => Err(format!("`{}` belongs to no interface", self.type_name(id)?)),
        }
    }

    fn rust_path(&self, id: TypeId) -> Result<String, String> {
        Ok(format!("{}::{}", self.module(id)?, camel(self.type_name(id)?)))
    }

    /// The type as a script's author knows it.
    fn rhai_type(&self, ty: &Type) -> Result<String, String> {
        if let Some(resource) = self.handle(ty) {
            return Ok(camel(self.type_name(resource)?));
        }
        Ok(match ty {
            Type::Bool => "bool".into(),
            Type::S64 => "int".into(),
            Type::F64 => "float".into(),
            Type::String => "String".into(),
            Type::Id(id) => {
                let id = self.definition(*id);
                match &self.resolve.types[id].kind {
                    TypeDefKind::List(_) => "Array".into(),
                    TypeDefKind::Option(of) => format!("{}?", self.rhai_type(of)?),
                    TypeDefKind::Record(_) => "Map".into(),
                    TypeDefKind::Enum(_) => "String".into(),
                    TypeDefKind::Variant(_) => "?".into(),
                    kind => return Err(format!("no Rhai type for a {}", kind.as_str())),
                }
            }
            other => return Err(format!("no Rhai type for {other:?}")),
        })
    }

    fn wit_type(&self, ty: &Type) -> String {
        match ty {
            Type::Id(id) => {
                let definition = &self.resolve.types[*id];
                match (&definition.name, &definition.kind) {
                    (Some(name), _) => name.clone(),
                    (None, TypeDefKind::Handle(Handle::Own(of))) => self.wit_type(&Type::Id(*of)),
                    (None, TypeDefKind::Handle(Handle::Borrow(of))) => {
                        format!("borrow<{}>", self.wit_type(&Type::Id(*of)))
                    }
                    (None, TypeDefKind::Option(of)) => format!("option<{}>", self.wit_type(of)),
                    (None, TypeDefKind::List(of)) => format!("list<{}>", self.wit_type(of)),
                    (None, TypeDefKind::Result(result)) => {
                        let side = |ty: &Option<Type>| ty.as_ref().map_or("_".to_string(), |ty| self.wit_type(ty));
                        format!("result<{}, {}>", side(&result.ok), side(&result.err))
                    }
                    (None, kind) => kind.as_str().to_string(),
                }
            }
            Type::S64 => "s64".into(),
            Type::F64 => "f64".into(),
            Type::Bool => "bool".into(),
            Type::String => "string".into(),
            other => format!("{other:?}").to_lowercase(),
        }
    }

    fn wit_signature(&self, function: &Function) -> String {
        let skip = usize::from(matches!(function.kind, FunctionKind::Method(_)));
        let params: Vec<String> = function.params[skip..]
            .iter()
            .map(|param| format!("{}: {}", param.name, self.wit_type(&param.ty)))
            .collect();
        let result = function.result.as_ref().map(|ty| format!(" -> {}", self.wit_type(ty))).unwrap_or_default();
        format!("{}: func({}){result}", function.item_name(), params.join(", "))
    }
}

fn snake(name: &str) -> String {
    name.replace('-', "_")
}

fn camel(name: &str) -> String {
    name.split('-')
        .map(|word| {
            let mut letters = word.chars();
            letters.next().map(|first| first.to_ascii_uppercase().to_string() + letters.as_str()).unwrap_or_default()
        })
        .collect()
}

fn docs(contents: &Option<String>) -> Vec<&str> {
    contents.as_deref().map(|text| text.trim().lines().map(str::trim_end).collect()).unwrap_or_default()
}

/// The operator that is another spelling of a method.
fn operator(name: &str) -> Option<&'static str> {
    Some(match name {
        "add" | "add_scalar" => "+",
        "sub" | "sub_scalar" => "-",
        "mul" | "mul_scalar" => "*",
        "div" | "div_scalar" => "/",
        "neg" => "-",
        _ => return None,
    })
}

/// The operator with a number on its left that is another spelling of a method.
fn left_operator(name: &str) -> Option<&'static str> {
    Some(match name {
        "add_scalar" => "+",
        "rsub_scalar" => "-",
        "mul_scalar" => "*",
        _ => return None,
    })
}

/// `next_step` is pulled by the iterator `steps`.
fn iterator(call: &Call) -> Option<String> {
    call.params.is_empty().then(|| call.name.strip_prefix("next_"))?.map(|item| match item.strip_suffix("ch") {
        Some(stem) => format!("{stem}ches"),
        None => format!("{item}s"),
    })
}

// ---- Rhai bindings

impl Surface<'_> {
    fn bindings(&self) -> Result<String, String> {
        let mut out = String::from(
            "//! Rhai bindings of `sdk/wit`. Generated by `cargo xtask sdk`; do not edit.\n\n\
             use rhai::{Array, Dynamic, INT, Map, NativeCallContext};\n\
             use wasmtime::component::Resource;\n\n\
             use super::api::{HostState, tensors, training, types};\n\
             use super::rhai::{Cases, Convert, Front, Handle, Kind, Pull, Shared, call, case, floats, integers, placed, plain};\n",
        );
        for interface in &self.interfaces {
            for (_, id) in &interface.types {
                self.conversion(*id, &mut out)?;
            }
        }
        for interface in &self.interfaces {
            let name = interface.name.as_deref().unwrap_or_default();
            let _ = write!(
                out,
                "\n/// Registers the interface `{name}`.\npub fn register_{}(front: &mut Front) {{\n",
                snake(name)
            );
            for (_, id) in &interface.types {
                if matches!(self.resolve.types[*id].kind, TypeDefKind::Resource) {
                    let path = self.rust_path(*id)?;
                    let _ = writeln!(
                        out,
                        "    front.engine.register_type_with_name::<Handle<{path}>>(\"{}\");",
                        camel(self.type_name(*id)?)
                    );
                }
            }
            for call in self.calls(interface)? {
                self.binding(&call, &mut out)?;
            }
            out.push_str("}\n");
        }
        self.signatures(&mut out)?;
        Ok(out)
    }

    /// How each function is used, for messages to those who used it otherwise.
    fn signatures(&self, out: &mut String) -> Result<(), String> {
        out.push_str("\n/// A function's name and how a script uses it.\npub const SIGNATURES: &[(&str, &str)] = &[\n");
        for interface in &self.interfaces {
            for call in self.calls(interface)? {
                let params: Vec<&str> = call.params.iter().map(|(name, _)| name.as_str()).collect();
                let params = params.join(", ");
                let usage = match (&call.form, call.resource) {
                    (Form::Property, Some(resource)) => format!("{resource}.{}", call.name),
                    (_, Some(resource)) => format!("{resource}.{}({params})", call.name),
                    (_, None) => format!("host::{}({params})", call.name),
                };
                let _ = writeln!(out, "    (\"{}\", \"{usage}\"),", call.name);
            }
        }
        out.push_str("];\n");
        Ok(())
    }

    fn conversion(&self, id: TypeId, out: &mut String) -> Result<(), String> {
        let definition = &self.resolve.types[id];
        let path = match definition.kind {
            TypeDefKind::Type(_) => return Ok(()),
            _ => self.rust_path(id)?,
        };
        match &definition.kind {
            TypeDefKind::Resource => {
                let host_trait = format!("{}::Host{}", self.module(id)?, camel(self.type_name(id)?));
                let _ = write!(
                    out,
                    "\nimpl Kind for {path} {{\n    fn release(host: &mut HostState, handle: Resource<Self>) {{\n        \
                     let _ = {host_trait}::drop(host, handle);\n    }}\n}}\n",
                );
            }
            TypeDefKind::Record(record) => {
                let _ = write!(
                    out,
                    "\nimpl Convert for {path} {{\n    type Rhai = Map;\n\n    fn to_rhai(self, shared: &Shared) -> Map {{\n        let mut map = Map::new();\n"
                );
                for field in &record.fields {
                    let name = snake(&field.name);
                    let _ = writeln!(
                        out,
                        "        map.insert(\"{name}\".into(), Dynamic::from(self.{name}.to_rhai(shared)));"
                    );
                }
                out.push_str("        map\n    }\n}\n");
            }
            TypeDefKind::Enum(cases) => {
                let _ = write!(
                    out,
                    "\nimpl Convert for {path} {{\n    type Rhai = rhai::ImmutableString;\n\n    fn to_rhai(self, _shared: &Shared) -> rhai::ImmutableString {{\n        match self {{\n"
                );
                for case in &cases.cases {
                    let _ = writeln!(out, "            Self::{} => \"{}\".into(),", camel(&case.name), case.name);
                }
                out.push_str("        }\n    }\n}\n");
                let _ =
                    write!(out, "\nimpl Cases for {path} {{\n    const CASES: &'static [(&'static str, Self)] = &[\n");
                for case in &cases.cases {
                    let _ = writeln!(out, "        (\"{}\", Self::{}),", case.name, camel(&case.name));
                }
                out.push_str("    ];\n}\n");
            }
            TypeDefKind::Variant(variant) => {
                // The value alone says which case it is, so a script sees the value.
                let mut seen = BTreeSet::new();
                for case in &variant.cases {
                    let shown = case.ty.as_ref().map_or(Ok("()".to_string()), |ty| self.rhai_type(ty))?;
                    if !seen.insert(shown.clone()) {
                        return Err(format!("two cases of `{}` are both {shown} in Rhai", self.type_name(id)?));
                    }
                }
                let _ = write!(
                    out,
                    "\nimpl Convert for {path} {{\n    type Rhai = Dynamic;\n\n    fn to_rhai(self, shared: &Shared) -> Dynamic {{\n        match self {{\n"
                );
                for case in &variant.cases {
                    let _ = match case.ty {
                        Some(_) => writeln!(
                            out,
                            "            Self::{}(value) => Dynamic::from(value.to_rhai(shared)),",
                            camel(&case.name)
                        ),
                        None => writeln!(out, "            Self::{} => Dynamic::UNIT,", camel(&case.name)),
                    };
                }
                out.push_str("        }\n    }\n}\n");
            }
            kind => return Err(format!("no conversion for a {}", kind.as_str())),
        }
        Ok(())
    }

    fn binding(&self, call: &Call, out: &mut String) -> Result<(), String> {
        let floats: Vec<usize> = call
            .params
            .iter()
            .enumerate()
            .filter(|(_, (_, ty))| matches!(ty, Type::F64))
            .map(|(index, _)| index)
            .collect();
        // A script's author writes `2` where a float is meant, and Rhai matches types exactly.
        for integers in 0..1usize << floats.len() {
            let integer = |index: usize| {
                floats.iter().position(|&float| float == index).is_some_and(|bit| (integers >> bit) & 1 == 1)
            };
            self.registration(call, &integer, &call.name, out)?;
            if let Some(operator) = operator(&call.name) {
                self.registration(call, &integer, operator, out)?;
            }
        }
        if let Some(operator) = left_operator(&call.name) {
            for (shown, rust, value) in [("float", "f64", "value"), ("int", "INT", "value as f64")] {
                let _ = writeln!(
                    out,
                    "    front.method(\"{operator}\", &[\"value: {shown}\", \"self: Tensor\", \"Tensor\"], |value: {rust}, this: Handle<{}>| this.call(|host| {}(host, this.resource(), {value})));",
                    self.owner(call)?,
                    self.host_function(call)?,
                );
            }
        }
        if let Some(iterator) = iterator(call) {
            let item = match &call.gives {
                Some(Type::Id(id)) => match &self.resolve.types[*id].kind {
                    TypeDefKind::Option(of) => self.handle(of),
                    _ => None,
                },
                _ => None,
            };
            let item = item.ok_or_else(|| format!("`{}` does not give an option of a resource", call.name))?;
            let of = self.owner(call)?;
            let item = self.rust_path(item)?;
            let _ = write!(
                out,
                "    front.engine.register_iterator_result::<Pull<{of}, {item}>, Handle<{item}>>();\n    \
                 front.method(\"{iterator}\", &[\"self: {}\", \"Iterator\"], |this: &mut Handle<{of}>| -> Pull<{of}, {item}> {{\n        \
                 Pull::new(this, |this| this.call(|host| {}(host, this.resource())))\n    }});\n",
                camel(call.resource.unwrap_or_default()),
                self.host_function(call)?,
            );
        }
        Ok(())
    }

    /// The Rust path of the trait method that is the function.
    fn host_function(&self, call: &Call) -> Result<String, String> {
        let (module, of) = match call.function.kind {
            FunctionKind::Method(id) => (self.module(id)?, camel(self.type_name(id)?)),
            _ => (call.interface, String::new()),
        };
        Ok(format!("{module}::Host{of}::{}", call.name))
    }

    /// The Rust path of the resource a method belongs to.
    fn owner(&self, call: &Call) -> Result<String, String> {
        match call.function.kind {
            FunctionKind::Method(id) => self.rust_path(id),
            _ => Err(format!("`{}` is no method", call.name)),
        }
    }

    fn registration(
        &self,
        call: &Call,
        integer: &dyn Fn(usize) -> bool,
        name: &str,
        out: &mut String,
    ) -> Result<(), String> {
        let (mut info, mut closure, mut arguments) = (vec![], vec![], vec![]);
        if let Some(resource) = call.resource {
            info.push(format!("self: {}", camel(resource)));
            closure.push(format!("this: &mut Handle<{}>", self.owner(call)?));
            arguments.push("this.resource()".to_string());
        }
        for (index, (param, ty)) in call.params.iter().enumerate() {
            let shown = if integer(index) { "int".into() } else { self.rhai_type(ty)? };
            info.push(format!("{param}: {shown}"));
            let (rust, argument) = match (self.handle(ty), ty) {
                (Some(resource), _) => {
                    (format!("Handle<{}>", self.rust_path(resource)?), format!("{param}.resource()"))
                }
                (None, Type::F64) if integer(index) => ("INT".into(), format!("{param} as f64")),
                (None, Type::F64) => ("f64".into(), param.clone()),
                (None, Type::S64) => ("INT".into(), param.clone()),
                (None, Type::Bool) => ("bool".into(), param.clone()),
                (None, Type::String) => ("rhai::ImmutableString".into(), format!("{param}.to_string()")),
                // Inside the call, whose errors these are too.
                (None, ty) if self.list_of(ty, Type::S64) => {
                    ("Array".into(), format!("integers(\"{name}\", {param})?"))
                }
                (None, ty) if self.list_of(ty, Type::F64) => ("Array".into(), format!("floats(\"{name}\", {param})?")),
                (None, Type::Id(id))
                    if matches!(self.resolve.types[self.definition(*id)].kind, TypeDefKind::Enum(_)) =>
                {
                    let of = self.rust_path(self.definition(*id))?;
                    ("rhai::ImmutableString".into(), format!("case::<{of}>(\"{name}\", &{param})?"))
                }
                (None, other) => return Err(format!("`{name}` takes {other:?}, which is not translated")),
            };
            closure.push(format!("{param}: {rust}"));
            arguments.push(argument);
        }
        info.push(match &call.gives {
            Some(ty) => self.rhai_type(ty)?,
            None => "()".into(),
        });
        let info: Vec<String> = info.iter().map(|part| format!("\"{part}\"")).collect();
        let register = match call.form {
            Form::Module => "function",
            Form::Method => "method",
            Form::Property => "property",
        };
        let how = if call.fallible { "call" } else { "plain" };
        arguments.insert(0, "host".into());
        let body = format!("{}({})", self.host_function(call)?, arguments.join(", "));
        let _ = match call.form {
            Form::Module => {
                closure.insert(0, "context: NativeCallContext".into());
                writeln!(
                    out,
                    "    let shared = front.shared.clone();\n    front.{register}(\"{name}\", &[{}], move |{}| placed(&context, {how}(&shared, |host| {body})));",
                    info.join(", "),
                    closure.join(", "),
                )
            }
            _ => writeln!(
                out,
                "    front.{register}(\"{name}\", &[{}], |{}| this.{how}(|host| {body}));",
                info.join(", "),
                closure.join(", "),
            ),
        };
        Ok(())
    }
}

// ---- Definition file

impl Surface<'_> {
    fn definitions(&self) -> Result<String, String> {
        let mut out = String::from(
            "// The host's functions for Rhai scripts, for editors. Generated by `cargo xtask sdk`; do not edit.\nmodule static;\n",
        );
        let mut functions = String::new();
        for interface in &self.interfaces {
            for call in self.calls(interface)? {
                let gives = call.gives.as_ref().map_or(Ok("()".into()), |ty| self.rhai_type(ty))?;
                let mut params: Vec<String> =
                    call.resource.iter().map(|resource| format!("self: {}", camel(resource))).collect();
                for (param, ty) in &call.params {
                    params.push(format!("{param}: {}", self.rhai_type(ty)?));
                }
                let (target, indent) = match call.form {
                    Form::Module => (&mut functions, "    "),
                    _ => (&mut out, ""),
                };
                target.push('\n');
                for line in docs(&call.function.docs.contents) {
                    let _ = writeln!(target, "{indent}/// {line}");
                }
                let get = if matches!(call.form, Form::Property) { "get " } else { "" };
                let _ = writeln!(target, "{indent}fn {get}{}({}) -> {gives};", call.name, params.join(", "));
                if let Some(operator) = operator(&call.name) {
                    let _ = writeln!(
                        target,
                        "\n{indent}/// `{}` as an operator.\n{indent}op {operator}({}) -> {gives};",
                        call.name,
                        params.join(", ")
                    );
                }
                if let Some(operator) = left_operator(&call.name) {
                    let _ = writeln!(
                        target,
                        "\n{indent}/// `{}` as an operator, the number first.\n{indent}op {operator}(value: float, self: Tensor) -> {gives};",
                        call.name,
                    );
                }
                if let Some(iterator) = iterator(&call) {
                    let _ = writeln!(
                        target,
                        "\n{indent}/// For `for`: calls `{}` until it gives none.\n{indent}fn {iterator}({}) -> Iterator;",
                        call.name,
                        params.join(", ")
                    );
                }
            }
        }
        out.push_str("\n// In a template:\n");
        for (declaration, about) in TEMPLATE_FUNCTIONS {
            let _ = write!(out, "\n/// {about}\n{declaration};\n");
        }
        let _ = write!(out, "\nmodule host {{{}}}\n", functions.trim_end_matches('\n').to_string() + "\n");
        Ok(out)
    }
}

// ---- Reference page

const REFERENCE_HEAD: &str = "\
<!-- Generated from sdk/wit by `cargo xtask sdk`; do not edit. -->

# `host:sdk`

What a recipe, a template or a loss may ask of `host`, and what it must offer. One contract for Wasm components and Rhai scripts:
`sdk/wit` is its source, this page, the Rhai bindings and the definition file `sdk/rhai/host.d.rhai` are generated from it.

How WIT reads in Rhai:

| WIT | Rhai |
| --- | --- |
| `kebab-name` | `kebab_name` |
| a function | `host::name(…)` |
| a method without arguments that cannot fail | a property: `batch.num_labels` |
| any other method | `object.name(…)` |
| `next-x: func() -> result<option<x>, error>` | also an iterator: `for x in object.xs() { … }` |
| `s64`, `f64`, `bool`, `string` | integer, float (an integer will do), `bool`, string |
| `list`, record, enum | array, map, string |
| `option` that is none | `()` |
| variant whose cases differ in type | the value itself |
| an `error` | thrown: `try { … } catch (e) { e.code; e.message; e.hint }` |
| `add` `sub` `mul` `div` `neg`, and with a number `add-scalar` `sub-scalar` `mul-scalar` `div-scalar` | also `+ - * /`, unary `-` |
| `add-scalar` `rsub-scalar` `mul-scalar` | also `+ - *` with the number first: `1.0 - x` |

In Rust (`host-sdk`) the names are the same in snake case, an error is an `Err`, operators take references and give a
`Result`, and `run.steps()`, `step.batches()` are iterators of `Result`s.
";

/// What a template script has besides the language's own functions: its declaration, and what it does.
pub const TEMPLATE_FUNCTIONS: &[(&str, &str)] = &[
    ("fn system(parts: String) -> Message", "A message that sets the scene."),
    ("fn system(parts: Array) -> Message", "Likewise, of parts that are tokenised each on its own."),
    ("fn user(parts: String) -> Message", "A message that asks."),
    ("fn user(parts: Array) -> Message", "Likewise, in parts."),
    ("fn assistant(parts: String) -> Message", "A message that answers."),
    ("fn assistant(parts: Array) -> Message", "Likewise, in parts."),
    ("fn tool(parts: String) -> Message", "What a tool answered."),
    ("fn tool(parts: Array) -> Message", "Likewise, in parts."),
    (
        "fn pair(chosen: Array, rejected: Array) -> Verdict",
        "Of a preference data set's row: the messages of the better and of the worse answer.",
    ),
    ("fn skip(reason: String) -> Verdict", "Leaves the row out."),
    ("fn fail(reason: String) -> Verdict", "Calls the row bad; `on_bad_row` decides."),
    ("fn get role(self: Message) -> String", "`system`, `user`, `assistant` or `tool`."),
    ("fn get text(self: Message) -> String", "The text of all parts."),
    ("fn get parts(self: Message) -> Array", "The parts, each a string."),
    ("fn set parts(self: Message, parts: Array)", "Replaces the parts."),
    (
        "fn get calls(self: Message) -> Array",
        "The tools that the assistant calls after its text, each a string of JSON: `{\"name\": …, \"arguments\": {…}}`.",
    ),
    (
        "fn set calls(self: Message, calls: Array)",
        "Replaces the calls, each a string of JSON or a map: `#{name: …, arguments: #{…}}`.",
    ),
    ("fn set train(self: Message, train: bool)", "Decides about loss on this message, whatever the config says."),
    (
        "fn wrap(self: Message, before: String, after: String) -> Message",
        "The message with a part before the others and one after them; an empty one is left out.",
    ),
];

const REFERENCE_ROWS_RHAI: &str = "\
### In Rhai

A template script defines `fn render(row)`, which gives back an array of messages, or `skip(reason)`, or `fail(reason)`.
`row` is a map from column to string, `()` where the row has no value; `row.messages`, the row as a conversation, is an
array of messages. `fn configure(columns)`, if there is one, is called once before any row and gives back the columns that
`render` reads; without it those are the config's, or `messages` where the data set has none. Either may take `settings` as a
second argument: the other keys of the section that names the template, as a map. `render` sees no variable of another row,
and `|x| …` none of the function around it: a `for` loop does.

| function | |
| --- | --- |
";

const REFERENCE_SCORING_RHAI: &str = "\
### In Rhai

A loss script defines `fn loss(logits, labels)`, or `fn loss(logits, labels, settings)` to be given the other keys of the
config's `loss` section as a map. It gives back `#{ sum: …, weight: … }`, a tensor and a number. It has what `tensors` offers.
";

impl Surface<'_> {
    fn reference(&self) -> Result<String, String> {
        let mut out = String::from(REFERENCE_HEAD);
        for interface in &self.interfaces {
            self.reference_interface(interface, "what the host offers", &mut out)?;
        }
        self.reference_interface(self.rows, "what a template offers", &mut out)?;
        out.push('\n');
        out.push_str(REFERENCE_ROWS_RHAI);
        for (declaration, about) in TEMPLATE_FUNCTIONS {
            let _ = writeln!(out, "| `{declaration}` | {about} |");
        }
        self.reference_interface(self.scoring, "what a loss offers", &mut out)?;
        out.push('\n');
        out.push_str(REFERENCE_SCORING_RHAI);
        Ok(out)
    }

    fn reference_interface(&self, interface: &Interface, role: &str, out: &mut String) -> Result<(), String> {
        let _ = writeln!(out, "\n## `{}`: {role}\n", interface.name.as_deref().unwrap_or_default());
        let _ = writeln!(out, "{}", docs(&interface.docs.contents).join("\n"));
        for (name, id) in &interface.types {
            let definition = &self.resolve.types[*id];
            let shown = match &definition.kind {
                TypeDefKind::Type(_) => continue,
                TypeDefKind::Resource => format!("resource `{name}`"),
                TypeDefKind::Enum(cases) => {
                    format!(
                        "enum `{name}`: {}",
                        cases.cases.iter().map(|case| format!("`{}`", case.name)).collect::<Vec<_>>().join(", ")
                    )
                }
                TypeDefKind::Record(record) => {
                    let fields: Vec<String> = record
                        .fields
                        .iter()
                        .map(|field| format!("`{}: {}`", field.name, self.wit_type(&field.ty)))
                        .collect();
                    format!("record `{name}`: {}", fields.join(", "))
                }
                TypeDefKind::Variant(variant) => {
                    let cases: Vec<String> = variant
                        .cases
                        .iter()
                        .map(|case| match &case.ty {
                            Some(ty) => format!("`{}({})`", case.name, self.wit_type(ty)),
                            None => format!("`{}`", case.name),
                        })
                        .collect();
                    format!("variant `{name}`: {}", cases.join(", "))
                }
                kind => format!("{} `{name}`", kind.as_str()),
            };
            let _ = writeln!(out, "\n- {shown}. {}", docs(&definition.docs.contents).join(" "));
        }
        let calls = self.calls(interface)?;
        let _ = writeln!(out, "\n| of | function | |\n| --- | --- | --- |");
        for call in &calls {
            let _ = writeln!(
                out,
                "| {} | `{}` | {} |",
                call.resource.map(|resource| format!("`{resource}`")).unwrap_or_default(),
                self.wit_signature(call.function),
                docs(&call.function.docs.contents).join(" ").replace('|', "\\|"),
            );
        }
        Ok(())
    }
}
