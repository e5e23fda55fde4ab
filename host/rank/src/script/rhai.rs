//! Guests that are Rhai scripts: the engine, its limits, and what the generated bindings stand on.
//!
//! Nothing here decides what a call does: a binding converts its arguments and calls the same trait method a Wasm guest
//! reaches. The host state sits in a cell that is never borrowed while script code runs, since no host call calls back.
//!
//! Rhai bounds each value where it is made, not their sum; the sum is counted by the allocator and looked at between
//! operations. What one operation makes at most is bounded by the sizes of its values. Functions keep no values, as a chain
//! of them would have no limit. A script gets the packages named below and nothing else of Rhai's: no clock, no `sleep`, which
//! nothing could end. All the same an engine in our own process is no wall: a template has one under [`super::isolate`], and Wasm
//! is the form for strangers' code.

use std::cell::{Cell, RefCell};
use std::fmt::Display;
use std::marker::PhantomData;
use std::path::Path;
use std::rc::Rc;

use host::config::limits::{
    GuestLimits, SCRIPT_ARRAY, SCRIPT_CALLS, SCRIPT_EXPRESSION, SCRIPT_FUNCTIONS, SCRIPT_MAP, SCRIPT_VARIABLES,
};
use host::worker::StopFlag;
use host::{Error, Result};
use rhai::module_resolvers::DummyModuleResolver;
use rhai::{
    AST, Array, Dynamic, Engine, EvalAltResult, FnPtr, FuncRegistration, ImmutableString, Map, Module,
    NativeCallContext, OptimizationLevel, ParseError, ParseErrorType, Position, RhaiNativeFunc, Scope,
};
use wasmtime::component::Resource;

use super::api::{Failure, HostError, HostResult, HostState, types};
use super::guest::Blame;
use super::limits::{PEAKS, Peaks};
use super::rhai_generated;
use super::training::Training;
use crate::train::Place;

/// The clock is read once in so many operations.
const CHECK_EVERY: u64 = 64;

pub type Shared = Rc<RefCell<HostState>>;
pub type RhaiResult<T> = std::result::Result<T, Box<EvalAltResult>>;

/// A resource a script can hold.
pub trait Kind: Sized + 'static {
    fn release(host: &mut HostState, handle: Resource<Self>);
}

struct Owned<T: Kind> {
    rep: u32,
    shared: Shared,
    kind: PhantomData<T>,
}

impl<T: Kind> Drop for Owned<T> {
    fn drop(&mut self) {
        // Values are dropped by script code, during which the state is not borrowed.
        if let Ok(mut host) = self.shared.try_borrow_mut() {
            T::release(&mut host, Resource::new_own(self.rep));
        }
    }
}

/// What a script holds of a resource. Copies share it, and the last one to go releases it.
pub struct Handle<T: Kind>(Rc<Owned<T>>);

impl<T: Kind> Clone for Handle<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Kind> Handle<T> {
    pub fn resource(&self) -> Resource<T> {
        Resource::new_borrow(self.0.rep)
    }

    /// Makes a host call that can fail.
    pub fn call<R: Convert>(&self, work: impl FnOnce(&mut HostState) -> HostResult<R>) -> RhaiResult<R::Rhai> {
        call(&self.0.shared, work)
    }

    /// Makes a host call that cannot fail but by ending the script.
    pub fn plain<R: Convert>(&self, work: impl FnOnce(&mut HostState) -> wasmtime::Result<R>) -> RhaiResult<R::Rhai> {
        plain(&self.0.shared, work)
    }
}

pub fn call<R: Convert>(shared: &Shared, work: impl FnOnce(&mut HostState) -> HostResult<R>) -> RhaiResult<R::Rhai> {
    let result = work(&mut shared.borrow_mut());
    match result {
        Ok(value) => Ok(value.to_rhai(shared)),
        Err(HostError::Guest(error)) => {
            Err(EvalAltResult::ErrorRuntime(error.to_rhai(shared).into(), Position::NONE).into())
        }
        Err(HostError::End(failure)) => {
            shared.borrow_mut().fail(*failure);
            Err(terminated())
        }
    }
}

pub fn plain<R: Convert>(
    shared: &Shared,
    work: impl FnOnce(&mut HostState) -> wasmtime::Result<R>,
) -> RhaiResult<R::Rhai> {
    let result = work(&mut shared.borrow_mut());
    match result {
        Ok(value) => Ok(value.to_rhai(shared)),
        Err(_) => Err(terminated()),
    }
}

/// An end that a script cannot catch; the state knows the reason.
fn terminated() -> Box<EvalAltResult> {
    EvalAltResult::ErrorTerminated(Dynamic::UNIT, Position::NONE).into()
}

/// A list of integers that a script hands over.
pub fn integers(name: &str, list: Array) -> HostResult<Vec<i64>> {
    list.into_iter().map(|item| item.as_int().map_err(|found| wrong_item(name, "integers", found))).collect()
}

/// A list of numbers that a script hands over, integers among them.
pub fn floats(name: &str, list: Array) -> HostResult<Vec<f64>> {
    let float = |item: Dynamic| item.as_float().or_else(|_| item.as_int().map(|int| int as f64));
    list.into_iter().map(|item| float(item).map_err(|found| wrong_item(name, "numbers", found))).collect()
}

/// An enum of the contract, by the names of its cases.
pub trait Cases: Copy + 'static {
    const CASES: &'static [(&'static str, Self)];
}

/// The case that a script names.
pub fn case<T: Cases>(function: &str, name: &str) -> HostResult<T> {
    T::CASES.iter().find(|(known, _)| *known == name).map(|(_, case)| *case).ok_or_else(|| {
        let message = format!(
            "`{function}` was given `{}`",
            name.escape_debug().to_string().chars().take(80).collect::<String>()
        );
        let known = T::CASES.iter().map(|(known, _)| format!("\"{known}\"")).collect::<Vec<_>>().join(", ");
        HostError::guest(types::Code::Invalid, message).hint(format!("it takes one of {known}"))
    })
}

fn wrong_item(name: &str, wanted: &str, found: &str) -> HostError {
    HostError::guest(types::Code::Invalid, format!("`{name}` takes a list of {wanted}, and one item is a {found}"))
}

/// Gives an error of `host::name(…)` the place of the call, which Rhai only does for methods.
pub fn placed<T>(context: &NativeCallContext, result: RhaiResult<T>) -> RhaiResult<T> {
    result.map_err(|mut error| {
        if error.position().is_none() {
            error.set_position(context.call_position());
        }
        error
    })
}

/// A value of the contract as a script sees it.
pub trait Convert {
    type Rhai: Clone + 'static;
    fn to_rhai(self, shared: &Shared) -> Self::Rhai;
}

macro_rules! same_in_rhai {
    ($($of:ty),*) => {$(
        impl Convert for $of {
            type Rhai = $of;

            fn to_rhai(self, _shared: &Shared) -> $of {
                self
            }
        }
    )*};
}

same_in_rhai!((), bool, i64, f64);

impl Convert for String {
    type Rhai = ImmutableString;

    fn to_rhai(self, _shared: &Shared) -> ImmutableString {
        self.into()
    }
}

impl<T: Convert> Convert for Vec<T> {
    type Rhai = Array;

    fn to_rhai(self, shared: &Shared) -> Array {
        self.into_iter().map(|value| Dynamic::from(value.to_rhai(shared))).collect()
    }
}

impl<T: Convert> Convert for Option<T> {
    type Rhai = Dynamic;

    fn to_rhai(self, shared: &Shared) -> Dynamic {
        self.map_or(Dynamic::UNIT, |value| Dynamic::from(value.to_rhai(shared)))
    }
}

impl<T: Kind> Convert for Resource<T> {
    type Rhai = Handle<T>;

    fn to_rhai(self, shared: &Shared) -> Handle<T> {
        Handle(Rc::new(Owned { rep: self.rep(), shared: shared.clone(), kind: PhantomData }))
    }
}

/// Calls a `next` function until it gives none; what `for` loops over.
pub struct Pull<S: Kind, I: Kind> {
    from: Handle<S>,
    next: fn(&Handle<S>) -> RhaiResult<Dynamic>,
    ended: bool,
    item: PhantomData<I>,
}

impl<S: Kind, I: Kind> Clone for Pull<S, I> {
    fn clone(&self) -> Self {
        Self { from: self.from.clone(), next: self.next, ended: self.ended, item: PhantomData }
    }
}

impl<S: Kind, I: Kind> Pull<S, I> {
    pub fn new(from: &Handle<S>, next: fn(&Handle<S>) -> RhaiResult<Dynamic>) -> Self {
        Self { from: from.clone(), next, ended: false, item: PhantomData }
    }
}

impl<S: Kind, I: Kind> Iterator for Pull<S, I> {
    type Item = RhaiResult<Handle<I>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = (self.next)(&self.from);
        self.ended = !matches!(&next, Ok(value) if !value.is_unit());
        match next {
            Ok(value) => value.try_cast::<Handle<I>>().map(Ok),
            Err(error) => Some(Err(error)),
        }
    }
}

/// An engine in the making, with the state its functions work on.
pub struct Front {
    pub engine: Engine,
    pub shared: Shared,
    host: Module,
}

impl Front {
    /// An engine with every limit set and nothing of the contract in it.
    pub fn new(state: HostState, limits: &GuestLimits) -> Self {
        let shared = Rc::new(RefCell::new(state));
        let mut engine = Engine::new_raw();
        add_packages(&mut engine);
        set_limits(&mut engine, limits);
        let log = shared.borrow().log.clone();
        engine.on_print(move |text| log.line(text));
        let log = shared.borrow().log.clone();
        engine.on_debug(move |text, _, position| log.line(&format!("{position}: {text}")));
        let progress = shared.clone();
        // The loop's turn and the operations up to it.
        let begun = Cell::new((0, 0));
        let most = limits.operations;
        engine.on_progress(move |operations| {
            let failure = {
                let state = progress.try_borrow().ok()?;
                if let Err(failure) = state.memory.check() {
                    drop(state);
                    progress.borrow_mut().fail(failure);
                    return Some(Dynamic::UNIT);
                }
                if !operations.is_multiple_of(CHECK_EVERY) {
                    return None;
                }
                let turn = state.clock.turns();
                if begun.get().0 != turn {
                    begun.set((turn, operations));
                }
                let done = operations.saturating_sub(begun.get().1);
                Peaks::raise(&PEAKS.operations, done);
                state.clock.check().err().or_else(|| (done > most).then(|| too_many_operations(most)))?
            };
            progress.borrow_mut().fail(failure);
            Some(Dynamic::UNIT)
        });
        Self { engine, shared, host: Module::new() }
    }

    /// Registers `host::name`.
    pub fn function<A: 'static, const N: usize, const X: bool, R, const F: bool>(
        &mut self,
        name: &str,
        info: &[&str],
        work: impl RhaiNativeFunc<A, N, X, R, F> + 'static,
    ) where
        R: Clone + 'static,
    {
        FuncRegistration::new(name).with_params_info(info).set_into_module(&mut self.host, work);
    }

    /// Registers `object.name(…)`, or an operator.
    pub fn method<A: 'static, const N: usize, const X: bool, R, const F: bool>(
        &mut self,
        name: &str,
        info: &[&str],
        work: impl RhaiNativeFunc<A, N, X, R, F> + 'static,
    ) where
        R: Clone + 'static,
    {
        FuncRegistration::new(name)
            .in_global_namespace()
            .with_volatility(true)
            .with_params_info(info)
            .register_into_engine(&mut self.engine, work);
    }

    /// Registers `object.name`.
    pub fn property<A: 'static, const N: usize, const X: bool, R, const F: bool>(
        &mut self,
        name: &str,
        info: &[&str],
        work: impl RhaiNativeFunc<A, N, X, R, F> + 'static,
    ) where
        R: Clone + 'static,
    {
        FuncRegistration::new_getter(name)
            .with_volatility(true)
            .with_params_info(info)
            .register_into_engine(&mut self.engine, work);
    }

    /// Closes the module `host`.
    pub fn finish(mut self) -> (Engine, Shared) {
        self.engine.register_static_module("host", self.host.into());
        (self.engine, self.shared)
    }
}

fn too_many_operations(most: u64) -> Failure {
    Failure::Guest(types::Error {
        code: types::Code::Limit,
        message: format!("the script took more than {most} operations without a turn of its loop"),
        hint: Some("look for a loop that does not end; work on many numbers belongs into tensor operations".into()),
    })
}

/// Arithmetic, texts, arrays and maps. Left out are time, `sleep`, `exit`, bytes and what tells of the engine itself.
fn add_packages(engine: &mut Engine) {
    use rhai::packages::*;
    let packages = [
        ArithmeticPackage::new().as_shared_module(),
        BasicStringPackage::new().as_shared_module(),
        BasicIteratorPackage::new().as_shared_module(),
        BasicFnPackage::new().as_shared_module(),
        BitFieldPackage::new().as_shared_module(),
        LogicPackage::new().as_shared_module(),
        BasicMathPackage::new().as_shared_module(),
        BasicMapPackage::new().as_shared_module(),
    ];
    // One module: every call of a script looks through all there are.
    let mut all = (*BasicArrayPackage::new().as_shared_module()).clone();
    for package in packages {
        all.combine_flatten((*package).clone());
    }
    FuncRegistration::new("map").set_into_module(&mut all, map);
    // Rhai looks at the size of a result when it is there; a text in place of each letter of another is their product.
    all.combine_flatten((*MoreStringPackage::new().as_shared_module()).clone());
    FuncRegistration::new("replace").set_into_module(&mut all, replace::<ImmutableString, ImmutableString>);
    FuncRegistration::new("replace").set_into_module(&mut all, replace::<ImmutableString, char>);
    FuncRegistration::new("replace").set_into_module(&mut all, replace::<char, ImmutableString>);
    FuncRegistration::new("replace").set_into_module(&mut all, replace::<char, char>);
    engine.register_global_module(all.into());
}

/// Rhai's own tries every element on a function without parameters first, and writes an error each time.
fn map(context: NativeCallContext, array: &mut Array, work: FnPtr) -> RhaiResult<Array> {
    let mut mapped = Array::with_capacity(array.len());
    let mut takes_one = true;
    for (index, item) in array.iter_mut().enumerate() {
        if takes_one {
            match work.call_raw(&context, None, [item.clone()]) {
                Err(error) if matches!(&*error, EvalAltResult::ErrorFunctionNotFound(name, _) if name.starts_with(work.fn_name())) => {
                    takes_one = false
                }
                result => {
                    mapped.push(result.map_err(|error| in_function("map", &context, error))?);
                    continue;
                }
            }
        }
        mapped.push(work.call_raw_with_extra_args(
            "map",
            &context,
            Some(item),
            [],
            [(index as i64).into()],
            Some(0),
        )?);
    }
    Ok(mapped)
}

fn in_function(name: &str, context: &NativeCallContext, error: Box<EvalAltResult>) -> Box<EvalAltResult> {
    let source = context.call_source().unwrap_or_default().to_owned();
    EvalAltResult::ErrorInFunctionCall(name.into(), source, error, Position::NONE).into()
}

fn replace<F: Display, T: Display>(
    context: NativeCallContext,
    text: &mut ImmutableString,
    find: F,
    with: T,
) -> RhaiResult<()> {
    let (find, with) = (find.to_string(), with.to_string());
    let grown = text.matches(find.as_str()).count() * with.len().saturating_sub(find.len());
    if text.len() + grown > context.engine().max_string_size() {
        return Err(EvalAltResult::ErrorDataTooLarge("Length of string".into(), context.call_position()).into());
    }
    *text = text.replace(&find, &with).into();
    Ok(())
}

fn set_limits(engine: &mut Engine, limits: &GuestLimits) {
    let [outside, inside] = SCRIPT_EXPRESSION;
    engine
        // They are counted from turn to turn of the loop (`on_progress`), not for a whole run.
        .set_max_operations(0)
        .set_max_call_levels(SCRIPT_CALLS)
        .set_max_expr_depths(outside, inside)
        .set_max_variables(SCRIPT_VARIABLES)
        .set_max_functions(SCRIPT_FUNCTIONS)
        .set_max_modules(0)
        .set_max_string_size(limits.script_string())
        .set_max_array_size(SCRIPT_ARRAY)
        .set_max_map_size(SCRIPT_MAP)
        .set_max_strings_interned(256)
        .set_module_resolver(DummyModuleResolver::new())
        .set_optimization_level(OptimizationLevel::None)
        .set_fail_on_invalid_map_property(true)
        .set_strict_variables(true)
        .disable_symbol("eval")
        .disable_symbol("import")
        .disable_symbol("curry");
}

/// An engine with all a recipe may call.
pub fn recipe_engine(state: HostState, limits: &GuestLimits) -> (Engine, Shared) {
    let mut front = Front::new(state, limits);
    rhai_generated::register_types(&mut front);
    rhai_generated::register_tensors(&mut front);
    rhai_generated::register_training(&mut front);
    front.finish()
}

/// Every function a recipe script can call, as Rhai describes it; a test compares them with the contract.
pub fn signatures() -> Vec<String> {
    let limits = GuestLimits::default();
    recipe_engine(HostState::new("", &limits, StopFlag::default(), None), &limits).0.gen_fn_signatures(false)
}

/// Finds what can be found in a recipe script without running it.
pub fn check_recipe(path: &Path, text: &str, limits: &GuestLimits) -> Result<()> {
    let state = HostState::new(&path.display().to_string(), limits, StopFlag::default(), None);
    parse(path, text, &recipe_engine(state, limits).0).map(|_| ())
}

pub fn run_recipe(
    text: &str,
    mut blame: Blame,
    limits: &GuestLimits,
    training: Box<dyn Training>,
    stop: StopFlag,
) -> Result<()> {
    let state = HostState::new(&blame.path.display().to_string(), limits, stop, Some(training));
    let (engine, shared) = recipe_engine(state, limits);
    let script = parse(&blame.path, text, &engine)?;
    let outcome = engine.run_ast_with_scope(&mut Scope::new(), &script);
    blame.place = shared.borrow().place();
    match outcome {
        Ok(()) => shared.borrow_mut().check_end(&blame),
        Err(error) => Err(explain(&blame, &mut shared.borrow_mut(), &error)),
    }
}

pub fn parse(path: &Path, text: &str, engine: &Engine) -> Result<AST> {
    engine.compile(text).map_err(|ParseError(kind, position)| {
        let error = Error::config(format!("cannot read the script `{}`", path.display()))
            .at(path, position.line(), position.position())
            .cause(super::log::clean_line(&kind.to_string()));
        match *kind {
            // It is there, but elsewhere.
            ParseErrorType::VariableUndefined(name) if is_defined(text, &name) => error
                .hint("a function, `|x| …` too, sees its parameters alone; a `for` loop sees what is around it")
                .hint("`const` makes what `global::NAME` reads"),
            _ => error,
        }
    })
}

/// Whether a variable or a function's parameter has this name somewhere in a script.
fn is_defined(text: &str, name: &str) -> bool {
    let is_parameter = |line: &str| {
        let parameters = line.trim_start().strip_prefix("fn ").and_then(|rest| rest.split(['(', ')']).nth(1));
        parameters.is_some_and(|parameters| parameters.split(',').any(|parameter| parameter.trim() == name))
    };
    text.contains(&format!("let {name} ")) || text.lines().any(is_parameter)
}

/// A failed script as an error: the host's own failure unchanged, else where in the script it was and why.
pub fn explain(blame: &Blame, state: &mut HostState, error: &EvalAltResult) -> Error {
    let (innermost, calls) = unwrap_calls(error);
    let position = innermost.position();
    let failure = state.take_failure();
    if let Some(Failure::Run(error)) = failure {
        let at = position.line().map(|line| host::error::Location {
            file: blame.path.clone(),
            line: Some(line),
            column: position.position(),
        });
        return state.run_failure(error, Place { location: at, function: None });
    }
    let mut report = match failure {
        Some(Failure::Guest(mistake)) => blame.mistake(mistake),
        _ => blame.mistake(thrown(innermost)),
    };
    if let Some(line) = position.line() {
        report = report.at(&blame.path, Some(line), position.position());
    }
    const MOST_CALLS: usize = 8;
    for (name, position) in calls.into_iter().take(MOST_CALLS) {
        // Rhai numbers those without a name.
        let name = if name.starts_with("anon$") { "|…|" } else { name };
        report = report.cause(format!("in `{name}`, called at line {}", position.line().unwrap_or_default()));
    }
    report
}

/// The error itself and the script functions it came through, innermost first.
fn unwrap_calls(mut error: &EvalAltResult) -> (&EvalAltResult, Vec<(&str, Position)>) {
    let mut calls = vec![];
    while let EvalAltResult::ErrorInFunctionCall(name, _, inner, position) = error {
        calls.push((name.as_str(), *position));
        error = inner;
    }
    calls.reverse();
    (error, calls)
}

/// What was thrown: the host's error map, or anything a script throws.
fn thrown(error: &EvalAltResult) -> types::Error {
    let plain = |message: String, hint: Option<String>| types::Error { code: types::Code::Invalid, message, hint };
    match error {
        EvalAltResult::ErrorRuntime(value, _) => match value.read_lock::<Map>() {
            Some(map) => {
                let text = |key: &str| map.get(key).and_then(|value| value.clone().into_immutable_string().ok());
                match text("message") {
                    Some(message) => plain(message.to_string(), text("hint").map(Into::into)),
                    None => plain(format!("the script threw {value}"), None),
                }
            }
            None => plain(format!("the script threw {value}"), None),
        },
        EvalAltResult::ErrorPropertyNotFound(name, _) => plain(format!("no property `{name}`"), None),
        EvalAltResult::ErrorFunctionNotFound(signature, _) => {
            let name = signature.split(" (").next().unwrap_or(signature);
            let hint = rhai_generated::SIGNATURES
                .iter()
                .find(|(known, _)| *known == name)
                .map(|(_, usage)| format!("`{name}` is used as `{usage}`"));
            plain(format!("no function `{signature}`"), hint)
        }
        EvalAltResult::ErrorTooManyOperations(_) | EvalAltResult::ErrorTerminated(..) => {
            plain("the script was stopped".into(), None)
        }
        other => {
            let text = other.to_string();
            // The position is reported as a location.
            plain(text.split(" (line ").next().unwrap_or(&text).to_string(), None)
        }
    }
}
