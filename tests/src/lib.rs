//! What the suites, the demo and the benches drive Beamline with: real programs as child processes, and a Router and an
//! HTTP peer of their own. Nothing here knows Beamline's code: flags, subjects and HTTP only.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "test support: a failure here is a test's failure, and says so"
)]

pub mod rig; // one of each
pub mod nats; // a broker that can be killed, paused and brought back
pub mod worker; // the program under test
pub mod calls; // what it asks of the kernel
pub mod policy; // what it is told about tenants
pub mod router; // publishes assignments, hears what is said about them
pub mod failpoint; // where a worker can be held
pub mod peer; // whom http.request calls
pub mod dns; // who knows its name
pub mod tcpfault; // a network that breaks
pub mod journal; // what a campaign writes down
pub mod database; // a server that ends with the tests
pub mod postgres; // a real PostgreSQL
pub mod mariadb; // a real MariaDB
pub mod trust; // accounts and certificates of a broker that asks for them
pub mod audit; // what must hold over everything that was sent
pub mod cluster; // a namespace of a real Kubernetes
pub mod plane; // a Kubernetes without nodes, of a test's own
pub mod api; // what it says
pub mod pool; // WorkerPools in it
pub mod keda; // who scales them
pub mod cert_manager; // who signs what it believes
pub mod apifault; // an API server that is in trouble
pub mod operator; // the other program under test
pub mod clock; // what time it takes it for
pub mod tool; // pinned programs
pub mod process; // children that end with their owner
pub mod wait; // until something is so
