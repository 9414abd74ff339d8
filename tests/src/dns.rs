//! A name server on a loopback address of its own, and what it was asked.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_resolver::proto::op::{Message, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, CNAME};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinHandle;

/// Where resolvers ask.
const PORT: u16 = 53;
/// What an answer by UDP may have, without extensions.
const LARGEST_UDP: usize = 512;
/// How long an answer is good.
const TTL: u32 = 300;

/// What is answered to a question for IPv4 addresses; one for IPv6 addresses has no answer, but where nothing else has.
#[derive(Clone, Debug)]
pub enum Answer {
    /// These addresses.
    Addresses(Vec<Ipv4Addr>),
    /// The first at first, then the second; nobody may keep either.
    First(Ipv4Addr, Ipv4Addr),
    /// Another name.
    Alias(&'static str),
    /// An error.
    Error(ResponseCode),
    /// These addresses, after a while.
    After(Duration, Vec<Ipv4Addr>),
    /// Nothing.
    Silence,
}

/// A name server; it ends when it is dropped.
#[derive(Debug)]
pub struct Dns {
    asked: Arc<Mutex<Vec<String>>>,
    resolv_conf: NamedTempFile,
    servers: [JoinHandle<()>; 2],
}

impl Dns {
    /// One that knows these names, with a dot at their end, and of no other.
    pub async fn start(names: impl Fn(&str) -> Option<Answer> + Send + Sync + 'static) -> Self {
        let (udp, tcp) = listen().await;
        let address = tcp.local_addr().expect("the listener has an address").ip();
        let resolv_conf = NamedTempFile::new().expect("a temporary file");
        std::fs::write(&resolv_conf, format!("nameserver {address}\n")).expect("a file to write to");
        let asked = Arc::default();
        let zone = Arc::new(Zone { names: Box::new(names), asked: Arc::clone(&asked) });
        let servers = [tokio::spawn(serve_udp(udp, Arc::clone(&zone))), tokio::spawn(serve_tcp(tcp, zone))];
        Self { asked, resolv_conf, servers }
    }

    /// The resolv.conf that names it.
    pub fn resolv_conf(&self) -> &Path {
        self.resolv_conf.path()
    }

    /// How often it was asked for the IPv4 addresses of a name.
    pub fn asked(&self, name: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|asked| *asked == name).count()
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
    }
}

/// A loopback address on which nobody serves names yet.
async fn listen() -> (UdpSocket, TcpListener) {
    for _ in 0..100 {
        let address = Ipv4Addr::new(127, 53, fastrand::u8(1..), fastrand::u8(1..255));
        if let Ok(tcp) = TcpListener::bind((address, PORT)).await
            && let Ok(udp) = UdpSocket::bind((address, PORT)).await
        {
            return (udp, tcp);
        }
    }
    panic!("no loopback address has a free port {PORT}: only root may listen there");
}

type Names = dyn Fn(&str) -> Option<Answer> + Send + Sync;

struct Zone {
    names: Box<Names>,
    asked: Arc<Mutex<Vec<String>>>,
}

async fn serve_udp(socket: UdpSocket, zone: Arc<Zone>) {
    let socket = Arc::new(socket);
    let mut question = [0; 4096];
    while let Ok((length, asker)) = socket.recv_from(&mut question).await {
        let (socket, zone, question) = (Arc::clone(&socket), Arc::clone(&zone), question[..length].to_vec());
        tokio::spawn(async move {
            if let Some(mut answer) = zone.answer(&question).await {
                let mut bytes = answer.to_vec().unwrap();
                if bytes.len() > LARGEST_UDP {
                    answer.answers.clear();
                    answer.metadata.truncation = true;
                    bytes = answer.to_vec().unwrap();
                }
                let _ = socket.send_to(&bytes, asker).await;
            }
        });
    }
}

async fn serve_tcp(listener: TcpListener, zone: Arc<Zone>) {
    while let Ok((stream, _)) = listener.accept().await {
        let zone = Arc::clone(&zone);
        tokio::spawn(async move { zone.talk(stream).await });
    }
}

impl Zone {
    async fn talk(&self, mut stream: TcpStream) -> Option<()> {
        loop {
            let length = stream.read_u16().await.ok()?;
            let mut question = vec![0; length.into()];
            stream.read_exact(&mut question).await.ok()?;
            let answer = self.answer(&question).await?.to_vec().ok()?;
            stream.write_u16(answer.len().try_into().ok()?).await.ok()?;
            stream.write_all(&answer).await.ok()?;
        }
    }

    async fn answer(&self, question: &[u8]) -> Option<Message> {
        let asked = Message::from_vec(question).ok()?;
        let query = asked.queries.first()?.clone();
        let name = query.name.to_ascii().to_lowercase();
        let mut reply = Message::response(asked.metadata.id, asked.metadata.op_code);
        reply.add_query(query.clone());
        reply.metadata.recursion_available = true;
        let is_v4 = query.query_type == RecordType::A;
        let before = {
            let mut asked = self.asked.lock().unwrap();
            let before = asked.iter().filter(|asked| **asked == name).count();
            asked.extend(is_v4.then(|| name.clone()));
            before
        };
        let mut add = |ttl, data| _ = reply.add_answer(Record::from_rdata(query.name.clone(), ttl, data));
        let mut addresses = |ttl, found: &[Ipv4Addr]| {
            found.iter().filter(|_| is_v4).for_each(|found| add(ttl, RData::A(A(*found))));
        };
        match (self.names)(&name) {
            None => reply.metadata.response_code = ResponseCode::NXDomain,
            Some(Answer::Addresses(found)) => addresses(TTL, &found),
            Some(Answer::First(first, then)) => addresses(0, &[if before == 0 { first } else { then }]),
            Some(Answer::Alias(to)) => add(TTL, RData::CNAME(CNAME(Name::from_ascii(to).unwrap()))),
            Some(Answer::Error(code)) => reply.metadata.response_code = code,
            Some(Answer::After(delay, found)) => {
                tokio::time::sleep(delay).await;
                addresses(TTL, &found);
            }
            Some(Answer::Silence) => return None,
        }
        Some(reply)
    }
}
