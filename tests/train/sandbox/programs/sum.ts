declare const require: any;
const s: string[] = require('fs').readFileSync(0, 'utf8').trim().split('\n');
const total: number = s.map(Number).reduce((a: number, b: number) => a + b, 0);
console.log(total); console.error('x');
